"""A reducer around runs of consecutive blocks: merged before the first, restored and corrected after the last."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.engine.call import Call, flat, like
from gen_turbo.engine.clock import Stream
from gen_turbo.engine.compiled import outside
from gen_turbo.engine.reduction import Reduction
from gen_turbo.tokens.token_map import TokenMap

_OTHER_STREAM = "encoder_hidden_states"
_BETWEEN_BLOCKS = ("controlnet", "skip_layers")


@dataclass
class _Running:
    """One call of a run between its first and its last hook.

    Attributes:
        call: The call of the first block, whose tokens are restored.
        call_now: The call of the block that runs.
        plan: Where tokens go; in a full call the plan whose misses are remembered, None if nothing is.
        is_full: Whether the blocks run on all tokens.
        merged: What the first block runs on, merged.
        given: In a full call, the arguments that the merged sequence has changed so far.
    """

    call: Call
    call_now: Call
    stream: Stream
    plan: TokenMap | None
    is_full: bool
    merged: Tensor | None
    given: dict[str, Any] = field(default_factory=dict)
    output: Any = None


class BlockRun:
    """Consecutive blocks of one stack; the tokens of all of them are merged once.

    In a full call each block runs on the merged sequence too, right after it ran in full, so that nothing of the run
    need be kept until its end.
    """

    def __init__(self, blocks: list[tuple[nn.Module, Reduction]]) -> None:
        self.reductions = [reduction for _, reduction in blocks]
        self._names = [tuple(inspect.signature(type(block).forward).parameters)[1:] for block, _ in blocks]
        self._running: dict[int, _Running] = {}

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks the blocks; ours are the last to see arguments and the first to see outputs."""
        handles = []
        for index, reduction in enumerate(self.reductions):
            block = model.get_submodule(reduction.layer.name)
            handles.append(block.register_forward_pre_hook(outside(self._before(index)), with_kwargs=True))
            handles.append(block.register_forward_hook(outside(self._after(index)), prepend=True))
        return handles

    def _before(self, index: int) -> Callable[..., Any]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            arguments = {**dict(zip(self._names[index], args, strict=False)), **kwargs}
            return self._enter_first(block, arguments) if index == 0 else self._enter(index, block, arguments)

        return before

    def _after(self, index: int) -> Callable[..., Any]:
        return lambda block, args, output: self._leave(index, output)

    def _enter_first(self, block: nn.Module, arguments: dict[str, Any]) -> Any:
        self._running.pop(get_ident(), None)
        reduction = self.reductions[0]
        stream = reduction.clock.current
        if stream is None:
            return None
        call = Call.of(block.forward, arguments, reduction.layer.form, stream.observation, reduction.layer.downsample)
        if call is None:
            return None
        plan = reduction.plan(call, stream, _no_value)
        wanted = reduction.remembered_plan(call, stream, _no_value) if plan is None else plan
        merged = None if wanted is None else call.merged(wanted)
        self._running[get_ident()] = _Running(call, call, stream, wanted, plan is None, merged)
        return None if plan is None or merged is None else ((), call.shortened(plan, merged))

    def _enter(self, index: int, block: nn.Module, arguments: dict[str, Any]) -> Any:
        running = self._running.get(get_ident())
        if running is None:
            return None
        layer, first = self.reductions[index].layer, running.call
        # Of the short sequence the positions are not known; those of the first block's tokens are its own.
        long = arguments if running.is_full else arguments | {layer.form.tokens: first.arguments[first.form.tokens]}
        call = Call.of(block.forward, long, layer.form, first.observation, layer.downsample)
        if call is None:
            raise ValueError(f"{layer.name} is called otherwise than the block before it; use merge_span=1")
        self.reductions[index].follow(call, running.plan, running.is_full)
        running.call_now = call
        if running.is_full or running.plan is None:
            return None
        return (), call.shortened(running.plan, arguments[layer.form.tokens])

    def _leave(self, index: int, output: Any) -> Any:
        running = self._running.get(get_ident())
        if running is None:
            return None
        if running.is_full and running.plan is not None and running.merged is not None:
            self._run_merged(running, running.plan, running.merged)
        if index < len(self.reductions) - 1:
            return None
        del self._running[get_ident()]
        call, plan, merged = running.call, running.plan, running.merged
        if plan is None or merged is None:
            return None
        if running.is_full:
            restored = call.restored(running.output, plan, merged)
            self.reductions[0].remember(call, running.stream, _no_value, output, lambda plan: restored)
            return None
        return like(self.reductions[0].corrected(call.restored(output, plan, merged), running.stream))

    def _run_merged(self, running: _Running, plan: TokenMap, merged: Tensor) -> None:
        """Runs the block that has just run in full on the merged sequence."""
        call = running.call_now
        tokens = running.given.pop(call.form.tokens, merged)
        running.output = call.function(**(call.shortened(plan, tokens) | running.given))
        outputs = flat(running.output)
        place = call.form.outputs[0]
        running.given = {call.form.tokens: outputs[place]}
        if len(outputs) == 2:
            running.given[_OTHER_STREAM] = outputs[1 - place]


def runs_of(model: nn.Module, reductions: Iterable[Reduction], length: int) -> list[list[tuple[nn.Module, Reduction]]]:
    """Cuts consecutive blocks of one stack and one ratio into runs of at most `length`; 0 sets no limit.

    Raises:
        ValueError: If a block takes what an earlier one gave, as with long skip connections.
    """
    runs: list[list[tuple[nn.Module, Reduction]]] = []
    for reduction in reductions:
        if reduction.layer.form.also and length != 1:
            raise ValueError(f"the blocks of {type(model).__name__} are linked across runs; use merge_span=1")
        pair = (model.get_submodule(reduction.layer.name), reduction)
        if runs and _follows(runs[-1][-1][1], reduction) and (length == 0 or len(runs[-1]) < length):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


def check_between(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if the root is asked to add to, or to leave out, blocks inside of a run."""
    for name, value in arguments.items():
        if value is not None and any(part in name for part in _BETWEEN_BLOCKS):
            raise ValueError(f"{name} reaches between blocks that share one short sequence; use merge_span=1")


def _follows(before: Reduction, after: Reduction) -> bool:
    stack, _, number = before.layer.name.rpartition(".")
    return after.layer.name == f"{stack}.{int(number) + 1}" and before.ratio == after.ratio


def _no_value(tokens: Tensor, kind: str) -> Tensor | None:
    """Blocks read tokens before any norm; their attention is not asked for the value of tokens."""
    return None
