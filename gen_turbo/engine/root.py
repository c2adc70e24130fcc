"""The entrance of an attached denoiser: what depends on the run or the step is decided here, once, before any layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from gen_turbo.engine.arrangement import Arrangement
from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.engine.branch import go_on
from gen_turbo.engine.context import Context
from gen_turbo.engine.graphs import Graphs
from gen_turbo.engine.layer import argument_names
from gen_turbo.engine.placed import Placed
from gen_turbo.engine.positions import lend
from gen_turbo.engine.prefix import short_text
from gen_turbo.engine.runs import NUM_RISES, RISING, Runs, no_effect
from gen_turbo.engine.settling import Settling
from gen_turbo.engine.skip import Skipping
from gen_turbo.engine.step import Step, eagerly
from gen_turbo.engine.text import MergedText
from gen_turbo.engine.values import kept_out, skipped
from gen_turbo.models.adapter import Adapter, ModelCall
from gen_turbo.models.conditions import CachedPrefix, MaskedText, TextSignature

_CHECKPOINTED = (
    "calls that record gradients run in full while gradient checkpointing is on, which runs blocks once more in the "
    "backward pass; call disable_gradient_checkpointing to reduce tokens while training"
)


class Root(Placed):
    """Stands in front of the whole model. One thread runs it at a time.

    Args:
        model: The model.
        adapter: Its family.
        arrangement: What stands in front of its layers before the first run.
        settling: Chooses another one for a run; None where the settings leave nothing open.
        text: Where text is merged or cut; None where it is not.
        skipping: What skips units; None where nothing does.
        graphs: Captures whole calls; None where nothing is captured.
        pipeline: The pipeline attached through.

    Attributes:
        arrangement: What stands in front of its layers now.
    """

    _is_on = False

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        arrangement: Arrangement,
        settling: Settling | None,
        text: TextSignature | MaskedText | CachedPrefix | None,
        skipping: Skipping | None,
        graphs: Graphs | None,
        pipeline: Any | None,
    ) -> None:
        super().__init__("", model)
        self.adapter, self.settling = adapter, settling
        self._take(arrangement)
        self.text, self.skipping, self.graphs = text, skipping, graphs
        self.runs = Runs(pipeline, adapter.time, self._fold, bool(adapter.models))
        self.names = argument_names(model)
        self.text_tokens, self.most_bytes = (0, 0), 0
        self.siblings: list[Root] = []
        self.owner: object = None
        self._one, self._is_compiled = torch.zeros(()), False

    def _change(self, arrangement: Arrangement) -> None:
        """Puts an arrangement in the place of the one before."""
        if arrangement is self.arrangement:
            return
        self.arrangement.remove()
        if self.graphs is not None:
            self.graphs.drop()
        self._take(arrangement)
        arrangement.install()

    def _take(self, arrangement: Arrangement) -> None:
        self.arrangement = arrangement
        self.beginning, self.program, self.insides = arrangement.beginning, arrangement.program, arrangement.insides

    def install(self) -> None:
        """Replaces the model's forward."""
        super().install()
        self._is_on = True

    def remove(self) -> None:
        """Puts the model's forward back and forgets all runs."""
        self._is_on = False
        super().remove()
        self.runs.forget()
        if self.graphs is not None:
            self.graphs.drop()

    @skipped
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with every layer set for the running step; torch.compile sees what is inside alone."""
        if not self._is_on:
            return self.inner(*args, **kwargs)
        self._is_compiled = get_eval_frame_callback() not in (None, False)
        step = self.begin(args, kwargs)
        try:
            if step.run is not None:
                _touched(self._one)
                step.output = self.replaced(step)
            else:
                step.output = self.inner(*step.args, **step.kwargs)
            if self.skipping is None:
                return step.output
            step.output = self.skipping.finished(step.output)
            return self.skipping.corrected(step.output)
        finally:
            self.end(step)

    @kept_out
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """Finds the run and the step of a call, and sets every layer for it."""
        self.runs.acquire()
        try:
            return self._begun(args, kwargs)
        except BaseException:
            self._rest()
            self.runs.release()
            raise

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        arguments = {**dict(zip(self.names[: len(args)], args, strict=True)), **kwargs}
        if torch.is_grad_enabled() and getattr(self.module, "is_gradient_checkpointing", False):
            # Blocks run once more in the backward pass, when steps, maps and memory have moved on.
            if self._expects_effect():
                warnings.warn(_CHECKPOINTED, NoEffectWarning, stacklevel=4)
            return Step(None, args, kwargs)
        if self._expects_effect():
            self.arrangement.check(self.module, arguments, self.settling is None)
        call = self.adapter.read(arguments)
        context = self.runs.find(call)
        is_new = context is None
        if context is None:
            context = self._opened(call, arguments)
        if self.settling is not None:
            is_captured = self.graphs is not None and call.sample.is_cuda
            self._change(self.settling.wanted(context, call, is_captured))
        self.beginning.context = context
        step, starts = Step(context, args, kwargs), False
        if self.text is not None:
            context.text = short_text(context, arguments, self.text, self.arrangement)
        if is_new:
            self._enter(context)
        if self.text is not None and context.text is not None:
            self._give(context.text, step, arguments, self.text)
        lend(self.arrangement.makers, context.positions, {**arguments, **step.kwargs})
        if self.skipping is not None:
            step.skipped, starts = self.skipping.begin(context, kwargs.get("return_dict", True))
        kind = self.program.begin(context, step.skipped)
        starts = starts or "starts" in kind
        self._choose(context, step, starts, kind)
        return step

    def _opened(self, call: ModelCall, arguments: dict[str, Any]) -> Context:
        """Begins a context for a call that continues none."""
        geometry = self.adapter.geometry(self.module, arguments)
        self.beginning.check(geometry)
        context = self.runs.open(call, geometry)
        if context.run.num_rises == NUM_RISES and self._expects_effect():
            warnings.warn(RISING, NoEffectWarning, stacklevel=5)
        return context

    def _choose(self, context: Context, step: Step, starts: bool, kind: tuple[object, ...]) -> None:
        """Decides what stands for a call: what skipping gives, an eager start, a captured step, or the model itself."""
        if self.skipping is not None and self.skipping.rows is not None:
            step.narrow(self.skipping.rows, self.insides.values())
            lend(self.arrangement.makers, None, {})
        elif self.skipping is not None and self.skipping.replaces_all:
            step.run = self.skipping.whole
        elif starts and not context.is_revived:
            step.run = lambda: eagerly(self.inner, step.args, step.kwargs)
            if self.graphs is not None and self.graphs.is_primed(context):
                step.run()
                context.is_revived, step.run = True, None
                self.program.enter(context)
                self.program.begin(context, step.skipped)
        elif self.graphs is not None:
            skips = self.skipping.kind if self.skipping is not None else ()
            step.run = self.graphs.run_for(self.inner, step, (kind, skips), is_once=bool(skips))

    def _rest(self) -> None:
        """Makes everything in front of layers stock, until the next call."""
        self.program.rest(self.beginning.context)
        if self.skipping is not None:
            self.skipping.rest()
        for inside in self.insides.values():
            inside.text_sizes = inside.hides = inside.map = inside.keys = None
        lend(self.arrangement.makers, None, {})
        self.beginning.context = None

    def _enter(self, context: Context) -> None:
        """Makes what a new context's layers hold, or gives them the buffers of an earlier one."""
        if self.graphs is not None:
            self.graphs.enter(self._is_compiled)
            self.graphs.idle.revive(context)
        self.program.enter(context)
        if self.skipping is not None:
            self.skipping.enter(context)
        elif (whole := go_on(context, self.runs.contexts())) is not None:
            self.runs.end(whole)

    @kept_out
    def replaced(self, step: Step) -> Any:
        """What stands for a call of the model as it is."""
        return step.run()

    @kept_out
    def end(self, step: Step) -> None:
        """Counts the step and makes every layer stock."""
        context = step.context
        try:
            if context is None:
                return
            num_reduced = self.program.end(context, step.skipped)
            if self.skipping is not None:
                num_reduced += self.skipping.end(step.output)
            context.run.num_reduced += num_reduced
            self.most_bytes = max(self.most_bytes, self.num_bytes)
            self._rest()
            has_failed = step.output is None
            over = None if has_failed else self.runs.finish(context)
            if has_failed or over is not None:
                for other in (self, *self.siblings) if has_failed else self.siblings:
                    other.runs.forget_run(context.run.marker)
            if over is not None and over.num_reduced == 0 and not over.is_told and self._expects_effect():
                warnings.warn(no_effect(over), NoEffectWarning, stacklevel=4)
        finally:
            # A call's arguments live no longer than the call: a pipeline's run ends with its text.
            step.run, step.args, step.kwargs = None, (), {}
            self.runs.release()

    @property
    def num_bytes(self) -> int:
        """Bytes remembered now."""
        contexts, skipping = self.runs.contexts(), self.skipping
        forecasts = sum(skipping.num_bytes(context) for context in contexts) if skipping is not None else 0
        return sum(context.num_bytes for context in contexts) + forecasts

    def _fold(self, context: Context) -> None:
        """Adds the counts of a context that has ended to those of its layers."""
        for layer, state in context.states.items():
            layer.totals.add(state)
        context.forget_positions(is_over=True)
        if self.graphs is not None:
            self.graphs.keep(context)

    def _expects_effect(self) -> bool:
        reducer = self.beginning.reducer
        return not reducer.keeps_all and any(layer.ratio > 0 for layer in self.program.layers)

    def _give(
        self,
        text: MergedText,
        step: Step,
        arguments: dict[str, Any],
        form: TextSignature | MaskedText | CachedPrefix,
    ) -> None:
        """Gives the model merged or cut text, or a merged prefix, which was made once per prompt."""
        if text.num_merged:
            num_own = text.num_text - getattr(form, "num_before", 0)
            self.text_tokens = num_own + text.num_merged, num_own
            step.args, step.kwargs = (), {**arguments, **text.arguments}
        if text.num_merged or text.hides is not None:
            for inside in self.insides.values():
                inside.install()
                if inside.has_text_keys:
                    inside.text_sizes, inside.hides = text.sizes, text.hides


def _touched(x: Tensor) -> Tensor:
    """An operation to compile: with `fullgraph=True` PyTorch refuses a call in which nothing compiled has run."""
    return x + 0
