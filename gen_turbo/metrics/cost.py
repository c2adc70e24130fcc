"""Counted arithmetic of attention: what a run spends, whatever did the reducing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled dot-product attention inside one layer.

    Attributes:
        layer: The attention layer's path in the model.
        num_queries: Tokens that ask.
        num_keys: Tokens that answer; differs from `num_queries` in cross-attention.
        flops: 4 * batch * heads * queries * keys * head width.
    """

    layer: str
    num_queries: int
    num_keys: int
    flops: int


@dataclass
class Cost:
    """What was counted between entering and leaving `count_cost`.

    Attributes:
        calls: Every call of scaled dot-product attention inside the model's layers, in order. Text encoder and
            autoencoder of a pipeline are other models.
        projection_flops: Linear layers inside attention layers, by layer: 2 * rows * in * out.
        matching_flops: Matrix products outside of linear layers and attention: the similarity of tokens.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    projection_flops: dict[str, int] = field(default_factory=dict)
    matching_flops: int = 0

    def attention_flops(self, layers: Sequence[str] | None = None) -> int:
        """Products with keys and with values, over some layers or over all."""
        return sum(call.flops for call in self.calls if layers is None or call.layer in layers)

    def tokens(self) -> dict[str, list[int]]:
        """Query tokens of each call, by layer and in order."""
        counts: dict[str, list[int]] = {}
        for call in self.calls:
            counts.setdefault(call.layer, []).append(call.num_queries)
        return counts

    def top_self_attention(self) -> list[str]:
        """The self-attention layers with the most tokens; only meaningful for a run without reduction."""
        squares = [call for call in self.calls if call.num_queries == call.num_keys]
        most = max((call.num_queries for call in squares), default=0)
        return sorted({call.layer for call in squares if call.num_queries == most})


@contextmanager
def count_cost(model: nn.Module) -> Iterator[Cost]:
    """Counts the attention arithmetic of everything that `model` runs inside the `with` block.

    Observes `scaled_dot_product_attention`, linear layers and matrix products where torch dispatches them, so
    processors, patched blocks and other packages are counted alike and nothing of the model is replaced. A
    layer is any module with `to_q`. A run that is counted is slow: do not time it.

    Yields:
        The cost, which grows while the block runs.
    """
    layers: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "to_q"):
            handles.append(module.register_forward_pre_hook(_enter(layers, name)))
            handles.append(module.register_forward_hook(_leave(layers), always_call=True))
    cost = Cost()
    functions = _FunctionCounter(cost, layers)
    try:
        with _MatmulCounter(cost, functions), functions:
            yield cost
    finally:
        for handle in handles:
            handle.remove()


def _enter(layers: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    return lambda _module, _args: layers.append(name)


def _leave(layers: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def leave(_module: nn.Module, _args: object, _output: object) -> None:
        layers.pop()

    return leave


class _FunctionCounter(TorchFunctionMode):
    """Sees calls under the names that the model's code uses."""

    def __init__(self, cost: Cost, layers: list[str]) -> None:
        super().__init__()
        self.cost = cost
        self.layers = layers
        self.depth = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._count_attention(*args, **kwargs)
        elif func is F.linear:
            self._count_linear(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        self.depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.depth -= 1

    def _count_attention(self, query: Tensor, key: Tensor, value: Tensor, *_args: object, **_kwargs: object) -> None:
        if not self.layers:
            return
        rows, head_width = query.shape[:-1].numel(), query.shape[-1]
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        flops = 2 * rows * num_keys * (head_width + value.shape[-1])
        self.cost.calls.append(AttentionCall(self.layers[-1], num_queries, num_keys, flops))

    def _count_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if self.layers:
            flops = 2 * input.shape[:-1].numel() * weight.numel()
            spent = self.cost.projection_flops
            spent[self.layers[-1]] = spent.get(self.layers[-1], 0) + flops


class _MatmulCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the matrix products that are neither a linear layer nor attention."""

    def __init__(self, cost: Cost, functions: _FunctionCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = cost
        self.functions = functions

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.functions.depth == 0 and name in _MATRIX_PRODUCTS:
            self.cost.matching_flops += 2 * output.numel() * args[_MATRIX_PRODUCTS[name]].shape[-1]
        return output


_MATRIX_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operation -> where its left factor stands among the arguments."""
