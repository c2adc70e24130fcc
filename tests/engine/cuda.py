"""A stand-in for CUDA graphs on a CPU: a capture records operators on their tensors, a replay runs them once more.

As on a GPU, what is captured has not run yet, nothing but operators is replayed, always on the tensors of the capture,
and a capture fails where the host asks for a number or draws one, or where all graphs of its pool have gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gen_turbo.engine.graphs import Graphs
from gen_turbo.kernels import verbs

_WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2")


class StandIn:
    """What has happened on the stand-in.

    Attributes:
        num_captured: Captures that went well.
        num_replayed: Replays.
        pools: The graphs of each pool of memory that was asked for.
        alive: Graphs that were not freed.
        eager: Milliseconds of an eager call.
        replay: Milliseconds of a replay, or what gives them for a number of operators.
    """

    replay: float | Callable[[int], float]

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0
        self.pools: list[weakref.WeakSet[Graph] | None] = []
        self.alive: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.eager, self.replay, self.clock = 10.0, 1.0, 0.0

    def since(self) -> tuple[int, int]:
        """Captures and replays since this was asked last."""
        found = self.num_captured, self.num_replayed
        self.num_captured = self.num_replayed = 0
        return found

    def pool(self) -> tuple[int, int]:
        """Another pool."""
        self.pools.append(None)
        return len(self.pools), 0


class Graph(TorchDispatchMode):
    """A recorded call."""

    def __init__(self, owner: StandIn) -> None:
        super().__init__()
        self._owner = owner
        self._steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in _WAITING or _counts(func, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            # What the host draws would be copied from its memory.
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._before.setdefault(id(value), (value, value.clone()))
        output = func(*args, **kwargs)
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view:
            is_new = not any(r.alias_info is not None for r in returns)
            made = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)] if is_new else []
            self._steps.append((func, args, kwargs, made))
        return output

    def undo(self) -> None:
        """Nothing has run during a capture."""
        for tensor, before in self._before.values():
            tensor.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Runs every operator on the tensors that it was captured with."""
        self._owner.num_replayed += 1
        cost = self._owner.replay
        self._owner.clock += cost(len(self._steps)) if callable(cost) else cost
        for func, args, kwargs, made in self._steps:
            output = func(*args, **kwargs)
            for tensor, value in zip(made, pytree.tree_leaves(output) if made else [], strict=False):
                tensor.copy_(value)


def _counts(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator takes the rows that a mask shows, of which the host has to know the number."""
    masks = args[1] if func is torch.ops.aten.index.Tensor else ()
    return any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks)


class Event:
    """A moment of the stand-in's clock, which goes on by replays alone."""

    owner: StandIn

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        """Now."""
        self.time = self.owner.clock

    def query(self) -> bool:
        """It has come."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds until another."""
        return end.time - self.time or self.owner.eager


def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Makes gen_turbo take the CPU for a GPU that has graphs."""
    owner = StandIn()

    @contextmanager
    def graph(made: Graph, pool: Any = None, **settings: Any) -> Iterator[None]:
        graphs = owner.pools[pool[0] - 1]
        if graphs is not None and not graphs:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: all graphs of this pool are gone")
        try:
            with made:
                yield
        finally:
            made.undo()
        owner.num_captured += 1
        owner.alive.add(made)
        owner.pools[pool[0] - 1] = (graphs or weakref.WeakSet()) | {made}

    def on_gpu(self: Graphs, context: Any) -> str:
        layout = context.layout
        context.layout = layout._replace(device=torch.device("cuda"))
        try:
            return obstacle(self, context)
        finally:
            context.layout = layout

    obstacle = Graphs._obstacle
    monkeypatch.setattr(Graphs, "_obstacle", on_gpu)
    monkeypatch.setattr(verbs, "_HAS_TRITON", False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(owner))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", owner.pool)
    monkeypatch.setattr(torch.cuda, "Event", type("Event", (Event,), {"owner": owner}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    return owner
