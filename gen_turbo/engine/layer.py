"""The whole life of a reduced call: one attention layer or transformer block, in full or on merged tokens.

What depends on the run or the step was decided before: the root writes the phase, the run's state and the numbers in
its buffers. A layer reads no clock, counts nothing, and is traced by torch.compile as it stands.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gen_turbo.engine.dispatch import ARGUMENTS, only_calls_processor
from gen_turbo.engine.placed import Placed
from gen_turbo.engine.run_map import taken
from gen_turbo.engine.state import LayerState, Phase, Totals
from gen_turbo.kernels import merge, restore
from gen_turbo.method import StepInfo
from gen_turbo.models.adapter import LayerSpec

if TYPE_CHECKING:
    from gen_turbo.engine.attention import InsideAttention
    from gen_turbo.engine.begin import Beginning


class ReducedLayer(Placed):
    """Stands in front of one attention layer or block.

    Attributes:
        spec: Where its image tokens are.
        ratio: The fraction of them that is removed.
        phase: What it does in the running step.
        state: What it holds in the running run.
        starts: Whether the running step is its first one with the map and memory of `state`.
        writes_map: Whether it makes the map anew in the running step, for itself and the layers that share it.
        is_first: Whether it merges; inside of a span its first block alone does.
        keeps_references: Whether references beside the target stay merged as they are then.
        step_info: What the method receives then.
        beginning: Makes maps and decides what a layer can take part in.
        inside: Reaches into the attention of the layer; None where nothing is asked for there.
        attention: The layer, where its own forward only chooses arguments for its processor, which a reduced call then
            calls itself: looking up what a processor takes costs diffusers more than all that is done here.
    """

    phase = Phase.FULL
    is_first = True
    keeps_references = True
    attention: Any = None

    def __init__(self, spec: LayerSpec, module: nn.Module, ratio: float, beginning: Beginning) -> None:
        super().__init__(spec.name, module)
        self.is_outermost = beginning.reducer.scope != "attention"
        self.spec, self.ratio, self.beginning = spec, ratio, beginning
        self.names = argument_names(module)
        self.tokens, self.outputs = spec.signature.tokens, spec.signature.outputs
        self.none, self.plain = spec.signature.none, spec.signature.plain
        self.is_residual = spec.signature.is_residual
        self.has_also = bool(spec.signature.also)
        args = spec.signature.token_args
        self.positions = [(n, repr([arg for arg in args if arg.name == n])) for n in {arg.name: None for arg in args}]
        self.state = _NONE
        self.starts = self.writes_map = False
        self.step_info = StepInfo()
        self.totals = Totals()
        self.inside: InsideAttention | None = None

    def install(self) -> None:
        """Replaces the forward."""
        super().install()
        self.attention = self.module if only_calls_processor(self.inner) else None

    # One Python frame: what a reduced call costs on the host is what it loses on a GPU.
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: C901
        """Runs the layer as the phase says."""
        if self.phase is Phase.FULL:
            return self.inner(*args, **kwargs)
        given = dict(zip(self.names[: len(args)], args, strict=True))
        given.update(kwargs)
        for name in self.none:
            if given.get(name) is not None:
                return self.inner(**given)
        state = self.state
        if self.starts and state.map is None:
            self.beginning.start(self, given)
        if state.map is None or state.base is None:
            return self.inner(**given)
        tokens = given[self.tokens]
        if self.writes_map:
            self.beginning.rewrite(self, tokens)
        full = self.inner(**given) if self.phase is Phase.REFRESH else None

        short = merge(tokens, state.map.order, state.map.offsets, state.map.share)
        given[self.tokens] = short
        if self.has_also:
            shorten_also(self, given, tokens)
        for name, key in self.positions:
            value, seen = given.get(name), state.base.seen.get(key)
            if seen is not None and not is_compiling() and seen[0] is value:
                given[name] = seen[1]
            elif value is not None:
                shorten_positions(self, name, key, given)
        if self.inside is not None:
            self.inside.map = state.base
        # Compiled graphs read the module that is behind no attribute of ours, so that layers share them.
        attention = None if is_compiling() else self.attention
        if attention is None or not given.keys() <= ARGUMENTS[type(attention.processor)]:
            output = self.inner(**given)
        else:
            output = attention.processor(attention, **given)
        if self.inside is not None:
            self.inside.map = None

        is_tuple = isinstance(output, tuple)
        outputs = output if is_tuple else (output,)
        base, minus = (tokens, short) if self.is_residual else (None, None)
        if full is not None:
            self.remember(full, outputs, base, minus)
            return full
        outputs = restore(outputs, state.map.slot, self.outputs, base, minus, self.plain, state.details, state.weights)
        return tuple(outputs) if is_tuple else outputs[0]

    def may_merge(self, given: dict[str, Any]) -> bool:
        """Whether a call can run on merged tokens, with the map made or made anew; `forward` has it written out."""
        for name in self.none:
            if given.get(name) is not None:
                return False
        state = self.state
        if self.starts and state.map is None:
            self.beginning.start(self, given)
        if state.map is None:
            return False
        if self.writes_map:
            self.beginning.rewrite(self, given[self.tokens])
        return True

    def restored(self, output: Any, base: Tensor | None, minus: Tensor | None) -> Any:
        """What a merged call gave with a row per token again, and what is remembered of each added."""
        state, is_tuple = self.state, isinstance(output, tuple)
        assert state.map is not None
        outputs = output if is_tuple else (output,)
        outputs = restore(outputs, state.map.slot, self.outputs, base, minus, self.plain, state.details, state.weights)
        return tuple(outputs) if is_tuple else outputs[0]

    @torch.no_grad()
    def remember(self, full: Any, outputs: Sequence[Any], base: Tensor | None, minus: Tensor | None) -> None:
        """Keeps what the merged call missed of the full one, and how it changed since the last time."""
        state = self.state
        assert state.map is not None
        wholes = full if isinstance(full, tuple) else (full,)
        restored = restore(outputs, state.map.slot, self.outputs, base, minus, self.plain)
        pairs = enumerate(zip(wholes, restored, strict=True))
        misses = [None if y is None or index in self.spec.unread else whole - y for index, (whole, y) in pairs]
        if self.starts:
            self.beginning.allocate(self, misses)
            return
        for miss, detail in zip(misses, state.details, strict=True):
            if miss is not None and detail is not None:
                if detail.shape[0] == 2:
                    detail[1] = (miss - detail[0]) / state.weights[1]
                detail[0] = miss


class MergedKeysLayer(ReducedLayer):
    """The same where keys and values alone are merged, so that every token still has a query of its own."""

    def __init__(self, spec: LayerSpec, module: nn.Module, ratio: float, beginning: Beginning) -> None:
        super().__init__(spec, module, ratio, beginning)
        # None has fewer rows than the tokens.
        self.outputs = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer as the phase says."""
        if self.phase is Phase.FULL:
            return self.inner(*args, **kwargs)
        given = dict(zip(self.names[: len(args)], args, strict=True))
        given.update(kwargs)
        if not self.may_merge(given):
            return self.inner(**given)
        state = self.state
        full = self.inner(**given) if self.phase is Phase.REFRESH else None
        assert self.inside is not None and state.map is not None
        self.inside.keys = self.inside.map = state.base
        output = self.inner(**given)
        self.inside.keys = self.inside.map = None
        if full is not None:
            self.remember(full, output if isinstance(output, tuple) else (output,), None, None)
            return full
        return self.restored(output, None, None)


def shorten(layer: ReducedLayer, given: dict[str, Any], tokens: Tensor) -> None:
    """Gives every other argument that has a row per token the rows of the merged ones."""
    if layer.has_also:
        shorten_also(layer, given, tokens)
    assert layer.state.base is not None
    for name, key in layer.positions:
        value, seen = given.get(name), layer.state.base.seen.get(key)
        if seen is not None and not is_compiling() and seen[0] is value:
            given[name] = seen[1]
        elif value is not None:
            shorten_positions(layer, name, key, given)


def shorten_also(layer: ReducedLayer, given: dict[str, Any], tokens: Tensor) -> None:
    """Merges the arguments that are averaged as the tokens are."""
    run_map = layer.state.map
    assert run_map is not None
    for name in layer.spec.signature.also:
        value = given.get(name)
        if value is tokens:
            given[name] = given[layer.tokens]
        elif value is not None:
            given[name] = merge(value, run_map.order, run_map.offsets, run_map.share)


def shorten_positions(layer: ReducedLayer, name: str, key: str, given: dict[str, Any]) -> None:
    """Takes the rows of an argument of positions, for all layers of the step that are given the same one."""
    state, before = layer.state, given[name]
    assert state.base is not None
    value = before
    for arg, rows in zip(layer.spec.signature.token_args, state.rows, strict=True):
        if arg.name != name or not rows:
            continue
        is_several = rows[0][0] is not None
        items = list(value) if is_several else [value]
        for index, row in rows:
            item, place = items[index or 0], index or 0
            items[place] = taken(item, row, arg.axis) if arg.has_batch else item.index_select(arg.axis, row)
        value = type(value)(items) if is_several else items[0]
    given[name] = value
    if not is_compiling():
        # Compiled code fuses the taking of rows, and a graph that counts who took them would be another; it neither
        # keeps them nor looks for what layers that are not compiled have kept.
        state.base.seen[key] = before, value


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module takes by position."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


_NONE = LayerState(torch.zeros(()))
