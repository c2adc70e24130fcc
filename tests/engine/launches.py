"""Counts what layers launch on a GPU, with the Triton kernels interpreted on a CPU, and prints it as JSON.

A script, since TRITON_INTERPRET must be set before triton is imported anywhere. It maps each family and kind of
settings to what each layer's call in the last step launched beside the layer itself, by name, and to how far the
result is from that of torch's form.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from stated import TurboProcessor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gen_turbo import attach
from gen_turbo.kernels import merge_triton, verbs
from tests.engine.families import family, relative

TIMES = (900, 800, 700, 600)
KINDS: dict[str, dict[str, object]] = {
    "copied": {"restore": "copy", "match_every": 0},
    "residual": {"full_every": 8},
    "blocks": {"full_every": 8, "scope": "block"},
    "keys alone": {"full_every": 8, "kv_only": True},
}
_NO_LAUNCH = ("empty", "new_empty", "empty_like", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Notes kernels of ours and operators that compute something; a view and an allocation launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (is_view or name in _NO_LAUNCH or self.is_inside):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def kernel(self, launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A launcher that counts as one, whatever the interpreter does for it."""

        def call(kernel: Any, *args: Any) -> Tensor:
            self.names.append(kernel.fn.__name__)
            self.is_inside = True
            try:
                return launch(kernel, *args)
            finally:
                self.is_inside = False

        return call

    def counted(self, function: Callable[..., object], into: list[list[str]]) -> Callable[..., object]:
        """The same function, which notes what each call launched."""

        def call(*args: object, **kwargs: object) -> object:
            before = len(self.names)
            output = function(*args, **kwargs)
            into.append(self.names[before:])
            return output

        return call


class Launchers(dict[Any, Any]):
    """Those of the interpreter, for every device."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.merge_kernel, self.unmerge_kernel = merge_triton.merge_kernel, merge_triton.unmerge_kernel
        self.launch_merge = launches.kernel(merge_triton.launch_merge)
        self.launch_unmerge = launches.kernel(merge_triton.launch_unmerge)

    def __missing__(self, index: Any) -> Launchers:
        return self


def launched(name: str, settings: dict[str, object]) -> tuple[list[list[str]], float]:
    """What each layer launched beside itself in the last step, and how far the result is from torch's form."""
    model, run = family(name)
    processor = TurboProcessor(0.4, **settings)
    with attach(model, processor, graphs=False):
        expected = run(times=TIMES)
    launches = Launches()
    with attach(model, processor, graphs=False) as attachment, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        patch.setattr(torch.cuda, "device", nullcontext)
        patch.setattr(verbs, "_launchers", Launchers(launches))
        calls: list[tuple[list[list[str]], list[list[str]]]] = []
        for layer in attachment.parts[0].layers:
            whole, inside = [], []
            calls.append((whole, inside))
            patch.setattr(layer.module, "forward", launches.counted(layer.module.forward, whole))
            patch.setattr(layer, "inner", launches.counted(layer.inner, inside))
            # What the layer computes is the same; past its forward nobody would count.
            patch.setattr(layer, "attention", None)
        with launches:
            got = run(times=TIMES)
    return [beside(whole[-1], inside[-1]) for whole, inside in calls], relative(got, expected)


def beside(whole: list[str], inside: list[str]) -> list[str]:
    """The launches of a call that are not those of the layer in it."""
    (start,) = [n for n in range(len(whole) + 1) if whole[n : n + len(inside)] == inside][:1]
    return whole[:start] + whole[start + len(inside) :]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {f"{name} {kind}": launched(name, KINDS[kind]) for name in sys.argv[1:] for kind in KINDS}
    print(json.dumps(found))
