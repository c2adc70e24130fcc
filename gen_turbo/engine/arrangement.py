"""What stands in front of the layers of a denoiser for one set of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from gen_turbo.engine.attention import InsideAttention
from gen_turbo.engine.backends import check_backend
from gen_turbo.engine.begin import Beginning
from gen_turbo.engine.choice import chosen_layers, layers_of
from gen_turbo.engine.layer import MergedKeysLayer, ReducedLayer
from gen_turbo.engine.layouts import FeatureMapKeysLayer, FeatureMapLayer, TokensFirstLayer
from gen_turbo.engine.positions import PositionMaker
from gen_turbo.engine.program import Program
from gen_turbo.engine.span import check_between, joined, spans_of
from gen_turbo.method import TokenReducer
from gen_turbo.models.adapter import WHOLE, Adapter, LayerSpec, Unit
from gen_turbo.models.conditions import CachedPrefix, MaskedText, TextSignature
from gen_turbo.training.schedule import MERGING

_INSIDE_ATTENTION = ("kv_only", "proportional_attention", "text_ratio", "attention_backend")


@dataclass(eq=False)
class Arrangement:
    """The layers that are reduced, and what decides over them.

    Attributes:
        reducer: The settings.
        specs: Every layer or block of the scope, reduced or not.
        layers: What stands in front of those that are, in the order of the model.
        insides: What reaches into attention.
        makers: What stands in front of modules that make positions.
        beginning: Makes maps and memory in the first step of a run.
        program: Chooses the phase of every layer.
        left: Why a layer that could be reduced is not, by name.
        chosen: What the cost model says of it; empty where everything was given.
    """

    reducer: TokenReducer
    specs: list[LayerSpec]
    layers: list[ReducedLayer]
    insides: dict[str, InsideAttention]
    makers: list[PositionMaker]
    beginning: Beginning
    program: Program
    left: Mapping[str, str] = field(default_factory=dict)
    chosen: str = ""

    @cached_property
    def has_spans(self) -> bool:
        """Whether blocks share one short sequence."""
        return any(hasattr(layer, "span") for layer in self.layers)

    @property
    def placed(self) -> list[Any]:
        """All that takes the place of something, what is called first last."""
        return [*self.insides.values(), *self.layers, *self.makers]

    def check(self, model: nn.Module, arguments: Mapping[str, Any], is_told: bool) -> None:
        """Looks at a call of the model before any layer runs.

        Args:
            model: The model.
            arguments: Of the call, by name.
            is_told: Whether the scope was given; one that was chosen allows for caches.

        Raises:
            ValueError: If something reaches between blocks of a span, or a cache of diffusers is on that compares whole
                sequences between blocks.
        """
        if self.has_spans:
            check_between(arguments)
        scope = self.reducer.scope
        if scope != "attention" and is_told and getattr(model, "is_cache_enabled", False):
            raise ValueError(
                f"scope={scope!r} cannot run with the cache that is on in {type(model).__name__}, which compares "
                "whole sequences; use scope='attention' or call disable_cache"
            )

    def install(self) -> None:
        """Puts everything in place but for what is so only while the model runs."""
        for placed in self.placed:
            if not getattr(placed, "is_lazy", False):
                placed.install()

    def remove(self) -> None:
        """Gives every forward back; what is put in place while the model runs stands before all others."""
        for placed in sorted(reversed(self.placed), key=lambda placed: not getattr(placed, "is_lazy", False)):
            placed.remove()


@dataclass(frozen=True)
class Arranger:
    """Makes arrangements of one model; nothing is put in place.

    Attributes:
        model: Gives the model.
        adapter: Its family.
        text: Where text is merged or cut; None where it is not.
        units: What may be skipped, by name.
    """

    model: Callable[[], nn.Module]
    adapter: Adapter
    text: TextSignature | MaskedText | CachedPrefix | None
    units: Mapping[str, Unit]

    def arranged(self, reducer: TokenReducer, names: tuple[str, ...] | None = None) -> Arrangement:
        """What stands in front of the layers for these settings, or for those of them that are named.

        Raises:
            ValueError: If no layer would be reduced, or a setting does not fit the model.
        """
        model = self.model()
        # Of a family that nobody knows whole calls can be left out alone.
        is_known = bool(self.adapter.models)
        specs = layers_of(model, self.adapter, reducer) if is_known else []
        chosen = chosen_layers(reducer, specs, type(model).__name__, names) if is_known else []
        beginning = Beginning(reducer, self.adapter)
        layers = self._spans(model, [_layer(model, *pair, beginning) for pair in chosen], reducer)
        insides = self._inside_attention(model, layers, reducer)
        left_out = {name: _layers_in(unit, layers) for name, unit in self.units.items()}
        left_out[MERGING] = [layer.name for layer in layers]
        makers = self._makers(model, layers, reducer)
        return Arrangement(reducer, specs, layers, insides, makers, beginning, Program(reducer, layers, left_out))

    def _spans(self, model: nn.Module, layers: list[ReducedLayer], reducer: TokenReducer) -> list[ReducedLayer]:
        """The layers, those of several blocks on one short sequence as its blocks."""
        if reducer.scope not in ("block", "model"):
            return layers
        is_model = reducer.scope == "model"
        length = 0 if is_model else reducer.merge_span
        spans = spans_of(model, layers, length, is_model and self.adapter.is_one_stack)
        return [block for span in spans for block in (joined(span) if len(span) > 1 else span)]

    def _makers(self, model: nn.Module, layers: list[ReducedLayer], reducer: TokenReducer) -> list[PositionMaker]:
        """What remembers positions; none for a module of somebody else's, or where memory is limited."""
        if reducer.memory_limit_mb is not None or not any(layer.ratio and layer.positions for layer in layers):
            return []
        modules = ((path, model.get_submodule(path), needs) for path, needs in self.adapter.positions.items())
        return [PositionMaker(*found) for found in modules if type(found[1]).__module__.startswith("diffusers.")]

    def _inside_attention(
        self, model: nn.Module, layers: list[ReducedLayer], tokens: TokenReducer
    ) -> dict[str, InsideAttention]:
        """What reaches into attention: of reduced layers where sizes or keys matter, of all for text and kernels."""
        reduced = {layer.name: layer for layer in layers}
        backend = tokens.attention_backend
        if backend is not None:
            check_backend(backend, model)
        is_inside = tokens.scope == "attention" and (tokens.kv_only or tokens.proportional_attention)
        insides = {}
        for spec in self.adapter.layers(model):
            for_text = self.text is not None and spec.signature.has_text_keys
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


def _layer(model: nn.Module, spec: LayerSpec, ratio: float, beginning: Beginning) -> ReducedLayer:
    kind: type[ReducedLayer] = MergedKeysLayer if beginning.reducer.kv_only else ReducedLayer
    if spec.signature.is_map:
        kind = FeatureMapKeysLayer if beginning.reducer.kv_only else FeatureMapLayer
    if spec.signature.is_tokens_first:
        kind = TokensFirstLayer
    # Layers of a method that keeps every token stay stock.
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
