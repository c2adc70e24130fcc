"""All arithmetic of a run, counted by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def counted(run: Callable[[], T], kind: str = "Global") -> tuple[T, int]:
    """Runs a function once and counts the floating point operations of its matrix products and convolutions.

    Args:
        run: The function.
        kind: Class of the module whose operations count; all by default.
    """
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        result = run()
    return result, sum(counter.get_flop_counts().get(kind, {}).values())


def operators(run: Callable[[], object]) -> int:
    """Runs a function once and counts the operators that torch dispatches, views among them."""
    counter: Any = _Operators()  # type: ignore[no-untyped-call]
    with counter:
        run()
    return int(counter.number)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **more: Any) -> int:
    """Products of attention, whose kernel for CPUs torch does not count; masked ones count too."""
    batch, heads, num_queries, _ = query
    return 2 * batch * heads * num_queries * key[2] * (key[3] + value[3])
