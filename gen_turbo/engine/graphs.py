"""Capturing whole calls of a denoiser: one CUDA graph per kind of step, which the host launches at once.

A call of a kind is captured after it has run eagerly, and replayed from then on; a replay runs the same kernels on the
same numbers. Captured calls read copies of their arguments at fixed addresses. What layers remember stays allocated
between runs as long as a graph reads it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from numbers import Number
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gen_turbo.engine.context import Context
from gen_turbo.engine.idle import Idle
from gen_turbo.engine.layer import argument_names
from gen_turbo.engine.watch import Watch
from gen_turbo.models.adapter import ModelCall

Mode = Literal["auto"] | bool
_EAGER_TIMED = 2
_VALUES = (Tensor, Number, str, bytes, tuple, Enum, torch.dtype, torch.device, type(None))
"""What a call may be given and may give: of anything else a graph would keep and show for ever what was captured."""
_GAIN = 0.97
"""A replay has to take no more than this share of the eager call, else graphs only hold memory."""


class GraphsWarning(UserWarning):
    """CUDA graphs were asked for where a call cannot be captured."""


@dataclass(eq=False)
class Captured:
    """Calls of one kind: how they ran eagerly, and the graph that replays them.

    Attributes:
        num_eager: Eager calls so far.
        timed: Events around eager calls and around replays.
        graph: The graph; None before it was captured.
        inputs: The tensors that it reads.
        spec: The tree structure of the arguments.
        output: What it writes.
        object_given: What the call gives that no graph can give, in words; empty for nothing.
    """

    num_eager: int = 0
    timed: dict[str, list[tuple[Any, Any]]] = field(default_factory=lambda: {"eager": [], "graph": []})
    graph: Any = None
    inputs: list[Tensor] = field(default_factory=list)
    spec: Any = None
    output: Any = None
    object_given: str = ""


class Graphs:
    """The graphs of one model.

    Args:
        model: The model.
        read: What reads the arguments of its calls.
        mode: True captures every kind of step, "auto" keeps graphs only where they measure faster.

    Attributes:
        status: What became of it, for the report.
        idle: What runs that have ended leave to later ones.
        is_compiled: Whether parts of the model are compiled.
        is_whole: Whether the whole model is.
    """

    def __init__(self, model: nn.Module, read: Callable[[dict[str, Any]], ModelCall], mode: Mode) -> None:
        self.mode, self._read, self._names = mode, read, argument_names(model)
        self.is_compiled = self.is_whole = False
        self.status, self.idle = "nothing captured yet", Idle()
        self.num_captured = self.num_replayed = 0
        self._model = model
        self._watch: Watch | None = None
        self._pool: Any = None
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._refused: str = ""
        self._gained, self._unjudged = False, weakref.WeakSet[Captured]()
        self._epoch = 0

    def run_for(self, inner: Callable[..., Any], step: Any, kind: Any, is_once: bool) -> Callable[[], Any] | None:
        """What runs a call by its graph or captures it; None where it has to run as it is.

        Args:
            inner: The model.
            step: The call: `args`, `kwargs` and `context`.
            kind: Identifies the kind of the step.
            is_once: Whether the call remembers something that it must not remember twice.
        """
        context, args, kwargs = step.context, step.args, step.kwargs
        why = self._refused or self._obstacle(context)
        if why:
            self._note(why)
            return None
        leaves, spec = pytree.tree_flatten(self._with_time(args, kwargs))
        why = _object_in(leaves)
        if why:
            self._note(why)
            return None
        is_first, sign = context.step == 0, tuple(_sign(leaf) for leaf in leaves)
        key = self._epoch, kind, sign, torch.is_inference_mode_enabled()
        known = context.captured.get(key)
        is_looked_at_later = is_first and not is_once and known is not None and known.graph is not None
        if self._watch is None or not self._watch.is_same(is_first and not is_looked_at_later):
            self.drop()
            self._watch = Watch(self._model)
        for stale in [key for key in context.captured if key[0] != self._epoch]:
            del context.captured[stale]
        entry = context.captured.setdefault((self._epoch, *key[1:]), Captured(spec=spec))
        if entry.object_given:
            self._note(entry.object_given)
            return None
        num_eager = _EAGER_TIMED if self.mode == "auto" else 1
        if is_first and context.is_revived:
            # The first step of an earlier run was eager, and one time does not show what graphs gain.
            num_eager = int(self.is_compiled)
        if entry.graph is None and entry.num_eager < num_eager:
            return lambda: self._eager(entry, inner, args, kwargs)
        if entry.graph is None:
            return lambda: self._capture(entry, inner, leaves, (args, kwargs))
        if is_looked_at_later:
            return lambda: self._replay_first(entry, leaves, lambda: inner(*args, **kwargs))
        return lambda: self._replay(entry, leaves)

    def _with_time(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with their time as a tensor: of a number, every step would be a graph of its own."""
        given = {**dict(zip(self._names[: len(args)], args, strict=True)), **kwargs}
        time, mark = self._read(given).timestep, object()
        if not isinstance(time, int | float):
            return args, kwargs
        # Another argument may be the same number.
        alike = (name for name, value in given.items() if value is time)
        name = next(name for name in alike if self._read({**given, name: mark}).timestep is mark)
        tensor = torch.tensor(time, dtype=torch.float64 if isinstance(time, float) else torch.int64)
        if name in kwargs:
            return args, {**kwargs, name: tensor}
        place = self._names.index(name)
        return (*args[:place], tensor, *args[place + 1 :]), kwargs

    def enter(self, is_whole: bool) -> None:
        """Notes at the beginning of a run what of the model is compiled: the whole of it, or some of its modules."""
        modules = self._model.modules() if self._watch is None else self._watch.modules
        self.is_whole, self.is_compiled = is_whole, any(m._compiled_call_impl is not None for m in modules)

    def is_primed(self, context: Context) -> bool:
        """Whether the buffers of a run are to be made before its first step, which runs compiled as in later runs."""
        return self.is_compiled and context.step == 0 and not self._obstacle(context)

    def keep(self, context: Context) -> None:
        """Keeps a context that has ended with its graphs, and with the buffers that these or compiled code read."""
        is_compiled = self.is_compiled and context.states and not self._obstacle(context)
        if context.captured and not self._refused or is_compiled:
            self.idle.keep(context)

    def drop(self) -> None:
        """Frees all graphs."""
        self.idle.drop()
        self._watch = None
        self._gained, self._unjudged = False, weakref.WeakSet()
        self._epoch += 1

    def _obstacle(self, context: Context) -> str:
        device = context.layout.device
        if device.type != "cuda":
            return f"the model runs on {device.type}, which has no CUDA graphs"
        if torch.is_grad_enabled():
            return "gradients are recorded"
        if torch._C._len_torch_dispatch_stack():
            return "operators are watched, as when FLOPs are counted, and a replay shows none"
        if self.is_whole:
            return "the whole model is compiled; compile its repeated blocks, which graphs can hold"
        if getattr(self._model, "is_cache_enabled", False):
            return "a cache is enabled, which decides on the host"
        if self._watch is not None and self._watch.is_offloaded:
            return "weights are offloaded layer by layer"
        return ""

    def _note(self, why: str) -> None:
        if self.mode is True and self.status != why:
            warnings.warn(f"CUDA graphs were asked for, but {why}; calls run as they are", GraphsWarning, stacklevel=6)
        self.status = why

    def _eager(self, entry: Captured, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        entry.num_eager += 1
        return _timed(entry.timed["eager"], lambda: inner(*args, **kwargs))

    def _capture(self, entry: Captured, inner: Callable[..., Any], leaves: list[Any], call: Any) -> Any:
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda)
        entry.inputs = [_static(leaf, device) for leaf in leaves if isinstance(leaf, Tensor)]
        left = iter(entry.inputs)
        args, kwargs = pytree.tree_unflatten([next(left) if isinstance(x, Tensor) else x for x in leaves], entry.spec)
        if not self._alive:
            # With its last graph a pool has died, and takes no other one.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do meanwhile is no part of the graph and must not end it.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                entry.output = inner(*args, **kwargs)
        except Exception as error:  # whatever a model does that a capture forbids
            torch.cuda.synchronize()
            self._refused = f"this model cannot be captured: {(str(error) or repr(error)).splitlines()[0]}"
            self._note(self._refused)
            return inner(*call[0], **call[1])
        entry.object_given = _object_in(pytree.tree_leaves(entry.output))
        if entry.object_given:
            entry.inputs, entry.output = [], None
            self._note(entry.object_given)
            return inner(*call[0], **call[1])
        entry.graph = graph
        self._alive.add(graph)
        self.num_captured += 1
        self.status = self.status if self._gained else "captured"
        if entry.timed["eager"]:
            self._unjudged.add(entry)
        return self._replay(entry, leaves)

    def _replay(self, entry: Captured, leaves: list[Any]) -> Any:
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for static, value in zip(entry.inputs, given, strict=True):
            static.copy_(value, non_blocking=True)
        self.num_replayed += 1
        if self.mode == "auto" and len(entry.timed["graph"]) < _EAGER_TIMED:
            _timed(entry.timed["graph"], entry.graph.replay)
        else:
            entry.graph.replay()
        output = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, entry.output)
        if self.mode == "auto":
            self._judge(entry)
        return output

    def _replay_first(self, entry: Captured, leaves: list[Any], again: Callable[[], Any]) -> Any:
        """Replays the first step of a run, and looks at the whole model while the device computes, not before.

        What the graph reads is there: tensors at the same addresses were seen already, and the modules of the capture
        are held. Where the model has changed in some other way the call runs once more, as it now is.
        """
        output = self._replay(entry, leaves)
        if self._watch is not None and not self._watch.is_same(True):
            self.drop()
            return again()
        return output

    def _judge(self, entry: Captured) -> None:
        """Gives graphs up where those of no kind of step gain, as soon as the device has run what was timed.

        A full step may take the device as long as the host, where a reduced one waits for the host.
        """
        eager, replays = entry.timed["eager"], entry.timed["graph"]
        if len(replays) < _EAGER_TIMED or not eager or not all(end.query() for _, end in (*eager, *replays)):
            return
        before = min(begin.elapsed_time(end) for begin, end in eager)
        after = min(begin.elapsed_time(end) for begin, end in replays)
        entry.timed["eager"] = []
        self._unjudged.discard(entry)
        if after <= _GAIN * before:
            self._gained, self.status = True, f"captured: {after:.1f} ms a step instead of {before:.1f}"
        elif not self._gained and not self._unjudged:
            self.status = self._refused = f"graphs gain nothing here: {after:.1f} ms a step, {before:.1f} without"
            self.drop()


def _sign(leaf: Any) -> object:
    """What a graph depends on of an argument: of a tensor all but its values, of another value that itself."""
    return (tuple(leaf.shape), leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _object_in(leaves: list[Any]) -> str:
    """Says of which class an argument or a result is that is neither a tensor nor a plain value; empty for none."""
    names = (type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _VALUES))
    return next((f"its calls hand on an object, here of the class {name}" for name in names), "")


def _static(leaf: Tensor, device: torch.device) -> Tensor:
    # Expanded tensors become whole ones, others keep their order of axes.
    return torch.empty_like(leaf, device=device, memory_format=torch.preserve_format).copy_(leaf)


def _timed(events: list[tuple[Any, Any]], function: Callable[[], Any]) -> Any:
    begin, end = _event(), _event()
    begin.record()
    result = function()
    end.record()
    events.append((begin, end))
    return result


def _event() -> Any:
    kind: Any = torch.cuda.Event
    return kind(enable_timing=True)
