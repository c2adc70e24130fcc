"""A reducer on one diffusers denoiser: which layers it takes, what stands in front of them, and the way back."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from torch import nn

from gen_turbo.engine.attention import InsideAttention, check_backend
from gen_turbo.engine.base import LayerReport, OnModel
from gen_turbo.engine.begin import Beginning
from gen_turbo.engine.choice import chosen_layers, layers_of
from gen_turbo.engine.cost import Cost
from gen_turbo.engine.graphs import Graphs, Mode
from gen_turbo.engine.layer import FeatureMapKeysLayer, FeatureMapLayer, MergedKeysLayer, ReducedLayer
from gen_turbo.engine.program import Program
from gen_turbo.engine.root import NoEffectWarning, Root
from gen_turbo.engine.skip import Skipping, UnitStats
from gen_turbo.engine.span import joined, spans_of
from gen_turbo.engine.state import Totals
from gen_turbo.method import TokenReducer
from gen_turbo.models.adapter import WHOLE, Adapter, LayerSpec, TextSignature, Unit
from gen_turbo.training.schedule import Schedule

_INSIDE_ATTENTION = ("kv_only", "proportional_attention", "text_ratio", "attention_backend")


@runtime_checkable
class LayerPruner(Protocol):
    """A reducer that skips layers of a denoiser too.

    Attributes:
        threshold: Largest relative error of a unit's last forecast at which it is still skipped; None for any.
    """

    threshold: float | None

    def merging(self) -> TokenReducer:
        """The reducer of the tokens of what runs."""
        ...

    def schedules(self, model: nn.Module) -> Sequence[Schedule]:
        """One schedule for each kind of run; none where nothing is skipped.

        Raises:
            ValueError: If there is none for this model.
        """
        ...


class DenoiserPart(OnModel):
    """A reducer on one denoiser.

    Attributes:
        reducer: What was attached.
        graphs: Whether calls are captured.
        layers: What stands in front of layers or blocks, in the order of the model.
        skipping: What leaves units out; None where nothing does.
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
        self._tokens = reducer.merging() if isinstance(reducer, LayerPruner) else reducer
        self._blocks = sorted({type(model.get_submodule(block.name)).__name__ for block in adapter.blocks(model)})
        self.specs = layers_of(model, adapter, self._tokens)
        chosen = chosen_layers(self._tokens, self.specs, type(model).__name__)
        self._check_references(adapter, any(ratio > 0 for _, ratio in chosen))
        beginning = Beginning(self._tokens, adapter)
        self.layers = self._spans(model, adapter, [_layer(model, *pair, beginning) for pair in chosen])
        self._text = self._text_signature(model, adapter)
        self._insides = self._inside_attention(model, adapter)
        self.skipping = self._skipping(model, adapter)
        units = self.skipping.units if self.skipping is not None else {}
        left_out = {name: _layers_in(unit, self.layers) for name, unit in units.items()}
        self.root = Root(
            model,
            adapter,
            beginning,
            Program(self._tokens, self.layers, left_out),
            self._insides,
            self._text,
            self.skipping,
            Graphs(model, graphs) if graphs is not False else None,
            pipeline,
        )
        self.root.owner = self

    def reference(self) -> Callable[[], Self | None]:
        """A weak reference: the model holds the part, and the part the forwards that it replaces, so the model."""
        return weakref.ref(self)

    def install(self) -> None:
        """Puts everything in place, what is called first last."""
        for placed in self._placed():
            if not getattr(placed, "is_lazy", False):
                placed.install()
        model: Any = self.model
        if not getattr(model, "_repeated_blocks", None) and self._blocks:
            # So that `compile_repeated_blocks` works where diffusers names none.
            model._repeated_blocks = self._blocks

    def remove(self) -> None:
        """Gives every forward back and forgets all runs; doing it twice is harmless."""
        # What is put in place while the model runs stands before all others.
        for placed in sorted(reversed(self._placed()), key=lambda placed: not getattr(placed, "is_lazy", False)):
            placed.remove()
        model = self._model()
        if model is not None and vars(model).get("_repeated_blocks") is self._blocks:
            del model._repeated_blocks

    def _placed(self) -> list[Any]:
        skipping = [self.skipping] if self.skipping is not None else []
        return [*self._insides.values(), *self.layers, *skipping, self.root]

    def _spans(self, model: nn.Module, adapter: Adapter, layers: list[ReducedLayer]) -> list[ReducedLayer]:
        """The layers, those of several blocks on one short sequence as its blocks."""
        if self._tokens.scope == "attention":
            return layers
        is_model = self._tokens.scope == "model"
        length = 0 if is_model else self._tokens.merge_span
        spans = spans_of(model, layers, length, is_model and adapter.is_one_stack)
        return [block for span in spans for block in (joined(span) if len(span) > 1 else span)]

    def _check_references(self, adapter: Adapter, is_reduced: bool) -> None:
        ratio = self._tokens.reference_ratio
        if ratio is not None and not adapter.has_references:
            raise ValueError(f"reference_ratio={ratio} has no references in {adapter.models[0]}; leave it out")
        if ratio and not is_reduced:
            raise ValueError(f"reference_ratio={ratio} reduces nothing beside ratio=0; set a ratio above 0")

    def _text_signature(self, model: nn.Module, adapter: Adapter) -> TextSignature | None:
        """Where text is merged; None where it is not, which is an error if it was asked for."""
        ratio, name = self._tokens.text_ratio, type(model).__name__
        if ratio == 0 or (ratio is None and not any(layer.ratio > 0 for layer in self.layers)):
            return None
        signature = adapter.text_signature(model)
        if isinstance(signature, str):
            why = f"text_ratio={ratio} has no text tokens to merge in {name}: {signature}; leave it out"
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

    def _inside_attention(self, model: nn.Module, adapter: Adapter) -> dict[str, InsideAttention]:
        """What reaches into attention: of reduced layers where sizes or keys matter, of all for text and kernels."""
        tokens, reduced = self._tokens, {layer.name: layer for layer in self.layers}
        backend = tokens.attention_backend
        if backend is not None:
            check_backend(backend, model)
        is_inside = tokens.scope == "attention" and (tokens.kv_only or tokens.proportional_attention)
        insides = {}
        for spec in adapter.layers(model):
            for_text = self._text is not None and spec.signature.has_text_keys
            for_layer = is_inside and spec.name in reduced
            module: Any = model.get_submodule(spec.name)
            # A processor with weights, such as an IP-Adapter's, chooses its kernels itself.
            for_kernel = backend is not None and not isinstance(module.processor, nn.Module)
            if not (for_text or for_layer or for_kernel):
                continue
            inside = InsideAttention(spec, module, tokens.proportional_attention and for_layer, backend)
            needs = [name for name in _INSIDE_ATTENTION if getattr(tokens, name)]
            if not inside.reaches:
                raise ValueError(
                    f"{' and '.join(needs)} cannot reach into {type(module.processor).__name__} at {spec.name}, which "
                    "calls no attention kernel of PyTorch; leave them out or use the model's default attention "
                    "processors"
                )
            inside.is_lazy = not for_layer and not for_kernel
            insides[spec.name] = inside
            if for_layer:
                reduced[spec.name].inside = inside
        return insides

    def _skipping(self, model: nn.Module, adapter: Adapter) -> Skipping | None:
        if not isinstance(self.reducer, LayerPruner):
            return None
        schedules = self.reducer.schedules(model)
        if not schedules:
            return None
        units, threshold = adapter.units(model), self.reducer.threshold
        skipping = Skipping(model, units, schedules, threshold, lambda: _warn(schedules))
        inside = [unit for unit in skipping.units if any(unit == b.name and hasattr(b, "span") for b in self.layers)]
        if inside:
            raise ValueError(
                f"the schedule skips {', '.join(inside)}, but merge_span={self._tokens.merge_span} joins blocks "
                "to spans on one short sequence, in which none can be skipped alone; use merge_span=1"
            )
        return skipping

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers whose tokens are reduced and the units that are skipped."""
        return (*(layer.name for layer in self.layers), *(self.skipping.units if self.skipping else ()))

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now for residuals and forecasts."""
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
    def graph_status(self) -> str:
        """What became of CUDA graphs; empty where none were wanted."""
        return self.root.graphs.status if self.root.graphs is not None else ""

    def rows(self) -> list[LayerReport]:
        """One row per layer, reduced or not."""
        reduced = {layer.name: layer for layer in self.layers}
        return [self._row(spec, reduced.get(spec.name)) for spec in self.specs]

    def _row(self, spec: LayerSpec, layer: ReducedLayer | None) -> LayerReport:
        if layer is None:
            return LayerReport(spec.name, spec.downsample, spec.left_alone or "level not chosen")
        totals: Totals = copy.deepcopy(layer.totals)
        for context in self.root.runs.contexts():
            totals.add(context.states[layer])
        cost = Cost.of(self.model.get_submodule(layer.name), self._tokens.kv_only)
        return cost.report(spec, totals)


def _layer(model: nn.Module, spec: LayerSpec, ratio: float, beginning: Beginning) -> ReducedLayer:
    kind: type[ReducedLayer] = MergedKeysLayer if beginning.reducer.kv_only else ReducedLayer
    if spec.signature.is_map:
        kind = FeatureMapKeysLayer if beginning.reducer.kv_only else FeatureMapLayer
    # A method that keeps every token leaves its layers stock.
    return kind(spec, model.get_submodule(spec.name), 0.0 if beginning.reducer.keeps_all else ratio, beginning)


def _layers_in(unit: Unit, layers: list[ReducedLayer]) -> list[str]:
    """The layers that do not run when a unit is skipped."""
    if unit.name == WHOLE:
        return [layer.name for layer in layers]
    modules = (unit.module, *unit.idle)
    return [
        layer.name
        for layer in layers
        if any(layer.name == name or layer.name.startswith(f"{name}.") for name in modules)
    ]


def _warn(schedules: Sequence[Schedule]) -> None:
    known = " or ".join(sorted({f"{len(schedule.times)} steps from {schedule.times[0]:g}" for schedule in schedules}))
    warnings.warn(
        f"nothing is skipped in this run: the schedules are for {known}; take as many steps, or calibrate for this run",
        NoEffectWarning,
        stacklevel=2,
    )
