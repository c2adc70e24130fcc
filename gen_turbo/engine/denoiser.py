"""A reducer on one diffusers denoiser: which layers it takes, what stands in front of them, and the way back."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from torch import nn

from gen_turbo.engine.arrangement import Arrangement, Arranger
from gen_turbo.engine.attention import InsideAttention
from gen_turbo.engine.base import LayerReport, NoEffectWarning, OnModel
from gen_turbo.engine.choice import without_auto
from gen_turbo.engine.costs.saved import Cost
from gen_turbo.engine.graphs import Graphs, Mode
from gen_turbo.engine.layer import ReducedLayer
from gen_turbo.engine.root import Root
from gen_turbo.engine.settling import Settling
from gen_turbo.engine.skip import Skipping, UnitStats
from gen_turbo.engine.state import Totals
from gen_turbo.method import TokenReducer
from gen_turbo.models.adapter import Adapter, LayerSpec
from gen_turbo.models.conditions import CachedPrefix, MaskedText, TextSignature
from gen_turbo.training.generic import Generic
from gen_turbo.training.schedule import Schedule

_OF_READING = {"last", "next", "input"}
"""What methods need that no denoiser has: the last token of a prompt in a decoder, and images to make smaller."""


@runtime_checkable
class LayerPruner(Protocol):
    """A reducer that skips layers of a denoiser too.

    Attributes:
        threshold: Largest relative error of a unit's last forecast at which it is still skipped; None for any.
    """

    threshold: float | None

    def merging(self, model: nn.Module) -> TokenReducer:
        """The reducer of the tokens of what runs on a model."""
        ...

    def schedules(self, model: nn.Module) -> Sequence[Schedule | Generic]:
        """One schedule for each kind of run, and a rule for others; none where nothing is skipped.

        Raises:
            ValueError: If what was asked for is not for this model.
        """
        ...


class DenoiserPart(OnModel):
    """A reducer on one denoiser.

    Attributes:
        reducer: What was attached.
        graphs: Whether calls are captured.
        skipping: What skips units; None where nothing does.
        root: What stands in front of the model.

    Raises:
        ValueError: If no layer would be reduced, a setting does not fit the model, or a schedule skips a block out of a
            span that shares a short sequence.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, reducer: TokenReducer, pipeline: Any | None, graphs: Mode = "auto"
    ) -> None:
        super().__init__(model)
        self.reducer, self.graphs = reducer, graphs
        self._tokens = reducer.merging(model) if isinstance(reducer, LayerPruner) else reducer
        for one in {id(one): one for one in (reducer, self._tokens)}.values():
            _check_needs(one, model)
        self._blocks = sorted({type(model.get_submodule(block.name)).__name__ for block in adapter.blocks(model)})
        self._check_references(model, adapter)
        text = self._text_signature(model, adapter)
        self.skipping = self._skipping(model, adapter)
        arranger = Arranger(lambda: self.model, adapter, text, self.skipping.units if self.skipping is not None else {})
        told = without_auto(self._tokens)
        self._first = arranger.arranged(told)
        # Schedules were calibrated beside settings that stand still; with a ratio of 0 there is nothing to choose.
        is_open = told is not self._tokens and self.skipping is None and self._tokens.removes_any
        settling = Settling(self._tokens, arranger) if is_open else None
        self._check_units()
        self.root = Root(
            model,
            adapter,
            self._first,
            settling,
            text,
            self.skipping,
            Graphs(model, adapter.read, graphs) if graphs is not False else None,
            pipeline,
        )
        self.root.owner = self

    def reference(self) -> Callable[[], Self | None]:
        """A weak reference: the model holds the part, and the part the forwards that it replaces, so the model."""
        return weakref.ref(self)

    def install(self) -> None:
        """Puts everything in place, what is called first last."""
        self.arrangement.install()
        for placed in self._outside():
            placed.install()
        model: Any = self.model
        if not getattr(model, "_repeated_blocks", None) and self._blocks:
            # So that `compile_repeated_blocks` works where diffusers names none.
            model._repeated_blocks = self._blocks

    def remove(self) -> None:
        """Gives every forward back and forgets all runs; doing it twice is harmless."""
        for placed in reversed(self._outside()):
            placed.remove()
        self.arrangement.remove()
        model = self._model()
        if model is not None and vars(model).get("_repeated_blocks") is self._blocks:
            del model._repeated_blocks

    def _outside(self) -> list[Any]:
        return [self.skipping, self.root] if self.skipping is not None else [self.root]

    @property
    def arrangement(self) -> Arrangement:
        """What stands in front of the layers now."""
        return self.root.arrangement

    @property
    def layers(self) -> list[ReducedLayer]:
        """What stands in front of layers or blocks now, in the order of the model."""
        return self.arrangement.layers

    def _check_references(self, model: nn.Module, adapter: Adapter) -> None:
        ratio = self._tokens.reference_ratio
        if ratio is not None and not adapter.has_references:
            raise ValueError(f"reference_ratio={ratio} has no references in {type(model).__name__}; leave it out")
        if ratio and not self._tokens.removes_any:
            raise ValueError(f"reference_ratio={ratio} reduces nothing beside ratio=0; set a ratio above 0")

    def _text_signature(self, model: nn.Module, adapter: Adapter) -> TextSignature | MaskedText | CachedPrefix | None:
        """Where text is merged or cut; None where it is not, which is an error if it was asked for."""
        ratio, name = self._tokens.text_ratio, type(model).__name__
        signature = adapter.text_signature(model)
        # References beside text that is kept may be merged without it.
        ratio = None if ratio == 0 and isinstance(signature, CachedPrefix) else ratio
        # A method that keeps all image tokens by design reads no ratio; a ratio of 0 wants stock, bit by bit.
        if ratio == 0 or (ratio is None and not self._tokens.removes_any and not self._tokens.keeps_all):
            return None
        if isinstance(signature, str) or (isinstance(signature, MaskedText) and ratio is not None):
            reason = signature if isinstance(signature, str) else signature.why
            why = f"text_ratio={ratio} has no text tokens to merge in {name}: {reason}; leave it out"
        else:
            attentions = [spec for spec in adapter.layers(model) if spec.signature.has_text_keys]
            candidates = (InsideAttention(s, model.get_submodule(s.name), False, None) for s in attentions)
            unreached = [inside.name for inside in candidates if not inside.reaches]
            if not unreached:
                return signature
            why = f"text_ratio={ratio} cannot weigh text at {unreached[0]} of {name}, whose attention it does not reach"
        if ratio is not None:
            raise ValueError(why)
        return None

    def _skipping(self, model: nn.Module, adapter: Adapter) -> Skipping | None:
        if not isinstance(self.reducer, LayerPruner):
            return None
        schedules = self.reducer.schedules(model)
        if not schedules:
            return None
        units, threshold = adapter.units(model), self.reducer.threshold
        skipping = Skipping(model, units, schedules, threshold, lambda: _warn(skipping))
        return skipping

    def _check_units(self) -> None:
        """Raises ValueError where a schedule skips a block out of a span."""
        units = self.skipping.units if self.skipping is not None else ()
        inside = [unit for unit in units if any(unit == b.name and hasattr(b, "span") for b in self._first.layers)]
        if inside:
            raise ValueError(
                f"the schedule skips {', '.join(inside)}, but of blocks that share one short sequence none can be "
                "skipped alone; use scope='block' with merge_span=1"
            )

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers whose tokens are reduced and the units that are skipped; before a run those that may be."""
        return (*(layer.name for layer in self._first.layers), *(self.skipping.units if self.skipping else ()))

    @property
    def choice(self) -> str:
        """What `scope="auto"` chose for the last run and expects of it; empty where everything was given."""
        return self.arrangement.chosen

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now for residuals, forecasts, token maps and merged text."""
        return self.root.num_bytes

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once so far."""
        return self.root.most_bytes

    @property
    def text_tokens(self) -> tuple[int, int]:
        """Text tokens of the last prompt whose text was merged, and what was left of them."""
        return self.root.text_tokens

    @property
    def skipped_units(self) -> dict[str, UnitStats]:
        """How often each unit of the schedules ran and was skipped."""
        return self.skipping.stats if self.skipping is not None else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the schedules are, in words, where that has to be said."""
        return tuple(self.skipping.notes) if self.skipping is not None else ()

    @property
    def graph_status(self) -> str:
        """What became of CUDA graphs; empty where none were wanted."""
        return self.root.graphs.status if self.root.graphs is not None else ""

    def rows(self) -> list[LayerReport]:
        """One row per layer, reduced or not."""
        reduced = {layer.name: layer for layer in self.layers}
        return [self._row(spec, reduced.get(spec.name)) for spec in self.arrangement.specs]

    def _row(self, spec: LayerSpec, layer: ReducedLayer | None) -> LayerReport:
        if layer is None:
            why = spec.left_alone or self.arrangement.left.get(spec.name, "level not chosen")
            return LayerReport(spec.name, spec.downsample, why)
        totals: Totals = copy.deepcopy(layer.totals)
        for context in self.root.runs.contexts():
            if layer in context.states:
                totals.add(context.states[layer])
        cost = Cost.of(self.model.get_submodule(layer.name), self._tokens.kv_only)
        return cost.report(spec, totals)


def _check_needs(reducer: TokenReducer, model: nn.Module) -> None:
    """Refuses methods and settings of vision-language models; raises ValueError."""
    kind, name = type(reducer), type(model).__name__
    if reducer.removes_any and _OF_READING & set(reducer.needs):
        raise ValueError(
            f"{kind.__name__} works on vision-language models alone, and {name} is a denoiser; use another processor, "
            "such as TurboProcessor"
        )
    if reducer.removes_any and reducer.scope in ("block", "model") and (what := reducer.reads_attention):
        raise ValueError(
            f"{what} needs the attention of layers, which scope={reducer.scope!r} does not show; use scope='attention'"
        )
    of_reading = (setting for cls in kind.__mro__ for setting in vars(cls).get("vlm_settings", ()))
    for setting, value in reducer.changed(of_reading).items():
        instead = "use ratio" if setting == "keep" else "leave it out"
        raise ValueError(f"{setting}={value!r} is of vision-language models; {name} is a denoiser, {instead}")


def _warn(skipping: Skipping) -> None:
    lengths = sorted({(len(schedule.times), schedule.times[0]) for schedule in skipping.schedules})
    known = " or ".join(f"{steps} steps from {first:g}" for steps, first in lengths)
    # With the rule, runs of other lengths are skipped too, but for those that it finds too short.
    why = (
        f"the schedules are for {known}; take as many steps, or calibrate for this run"
        if skipping.generic is None
        else "it has too few steps for this budget; take at least 4 steps, or a smaller budget"
    )
    warnings.warn(f"nothing is skipped in this run: {why}", NoEffectWarning, stacklevel=2)
