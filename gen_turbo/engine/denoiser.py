"""A reducer on one diffusers denoiser: which layers it takes, the hooks at the root, and the way back."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.engine.attention import check_backend, reaches_attention
from gen_turbo.engine.base import SELF_ATTENTION, DenoiserHost, Layer, LayerReport, OnModel, TextForm
from gen_turbo.engine.bind import Binding, bind, binding_of, positional_names, unbind, unbound
from gen_turbo.engine.block import BlockBinding
from gen_turbo.engine.choice import chosen_layers, layers_of
from gen_turbo.engine.clock import Clock, Stream, run_facts_of
from gen_turbo.engine.compiled import begun, ended, number_of, outside
from gen_turbo.engine.reduction import Cost, Reduction
from gen_turbo.engine.runs import BlockRun, check_between, runs_of
from gen_turbo.engine.text import MergedText, merge_text
from gen_turbo.engine.text_keys import TextProjection
from gen_turbo.method import TokenReducer

_NOT_PER_TOKEN = ("add_", "norm", "context", "attn2.to_k", "attn2.to_v", "adaLN", "fuser")


_INSIDE_ATTENTION = ("kv_only", "proportional_attention", "text_ratio", "attention_backend")


class NoEffectWarning(UserWarning):
    """A whole run went by without one reduced layer."""


class DenoiserPart(OnModel):
    """A reducer on one denoiser: the bindings, the hooks, and what was there before."""

    def __init__(self, model: nn.Module, host: DenoiserHost, reducer: TokenReducer, pipeline: Any | None) -> None:
        super().__init__(model)
        self.reducer = reducer
        self.clock = Clock(run_facts_of(pipeline))
        self._host = host
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._handles: list[RemovableHandle] = []
        self._is_installed = False
        self.number = number_of(self)
        self.layers = layers_of(model, host, reducer)
        self.reductions = {
            layer.name: self._reduction(model, layer, ratio, index)
            for index, (layer, ratio) in enumerate(chosen_layers(reducer, self.layers, type(model).__name__))
        }
        is_block = reducer.scope == "block"
        runs = runs_of(model, self.reductions.values(), reducer.merge_span) if is_block else []
        self.runs = [BlockRun(run) for run in runs if len(run) > 1]
        alone = [run[0] for run in runs if len(run) == 1]
        self.blocks = {reduction.layer.name: BlockBinding.of(block, reduction) for block, reduction in alone}
        self._text = self._text_form(model)
        self.text_tokens = 0, 0
        attended = {} if is_block else self.reductions
        if reducer.attention_backend is not None:
            check_backend(reducer.attention_backend, model)
        if reducer.attention_backend is not None or self._text is not None:
            others = [layer for layer in host.layers(model) if layer.name not in attended and _is_free(model, layer)]
            attended = attended | {layer.name: self._reduction(model, _passive(layer), 0.0, 0) for layer in others}
        self._projections = [
            TextProjection(name, model.get_submodule(name), self.clock, reducer.memory_limit_mb)
            for name in (host.text_projections(model) if reducer.reuse_text else ())
        ]
        self.bindings = {name: self._binding(model, reduction) for name, reduction in attended.items()}

    def _reduction(self, model: nn.Module, layer: Layer, ratio: float, index: int) -> Reduction:
        return Reduction(layer, self.reducer, ratio, self.clock, index, _cost(model.get_submodule(layer.name)))

    def _text_form(self, model: nn.Module) -> TextForm | None:
        """Where text is merged; None where it is not, which is an error if it was asked for."""
        ratio, name = self.reducer.text_ratio, type(model).__name__
        if ratio == 0 or (ratio is None and not any(reduction.ratio > 0 for reduction in self.reductions.values())):
            return None
        form = self._host.text_form(model)
        if isinstance(form, str):
            why = f"text_ratio={ratio} has no text tokens to merge in {name}: {form}; leave it out"
        else:
            layers = [layer for layer in self._host.layers(model) if layer.form.has_text_keys]
            unweighed = [layer.name for layer in layers if not self._can_weigh(model, layer)]
            self._text_layers = [layer.name for layer in layers]
            if not unweighed:
                return form
            why = f"text_ratio={ratio} cannot weigh text at {unweighed[0]} of {name}, whose attention it does not reach"
        if ratio is not None:
            raise ValueError(why)
        return None

    def _can_weigh(self, model: nn.Module, layer: Layer) -> bool:
        is_bound = _is_free(model, layer) or (self.reducer.scope == "attention" and layer.name in self.reductions)
        return is_bound and reaches_attention(unbound(_processor(model, layer.name)))

    def _binding(self, model: nn.Module, reduction: Reduction) -> Binding:
        inner = unbound(_processor(model, reduction.layer.name))
        needs = [name for name in _INSIDE_ATTENTION if getattr(self.reducer, name)]
        if needs and not reaches_attention(inner):
            raise ValueError(
                f"{' and '.join(needs)} cannot reach into {type(inner).__name__} at {reduction.layer.name}, which "
                "calls no attention kernel of PyTorch; leave them out or use the model's default attention processors"
            )
        attn = weakref.ref(model.get_submodule(reduction.layer.name))
        return Binding(inner, reduction, self._host, positional_names(inner), attn)

    def install(self) -> None:
        """Puts the bound processors, the hooks of blocks and the two root hooks in place."""
        model = self.model
        for name, binding in self.bindings.items():
            _set_processor(model, name, bind(binding))

        names, number, is_traced = self._names, self.number, self._is_traced
        begin, end = outside(self.begin), outside(self.end)

        def before(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if is_traced and torch.compiler.is_compiling():
                return begun(names, args, kwargs, number)
            return begin({**dict(zip(names, args, strict=False)), **kwargs})

        def after(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return ended(output, number) if is_traced and torch.compiler.is_compiling() else end()

        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        for name, block in self.blocks.items():
            self._handles += block.install(model.get_submodule(name))
        for run in self.runs:
            self._handles += run.install(model)
        for projection in self._projections:
            projection.install()
        self._is_installed = True

    @property
    def _is_traced(self) -> bool:
        """Whether a graph can hold a whole call: all that is asked of it is tokens that come alone."""
        forms = {reduction.layer.form for reduction in self.reductions.values()}
        return forms == {SELF_ATTENTION} and self.reducer.scope == "attention" and self._text is None

    def begin(self, arguments: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Notes a call of the root; gives other arguments where its text is merged."""
        if self.runs:
            check_between(arguments)
        if self.reducer.scope == "block" and getattr(self.model, "is_cache_enabled", False):
            raise ValueError(
                f"scope='block' cannot run with the cache that is on in {type(self.model).__name__}, which compares "
                "whole sequences; use scope='attention' or call disable_cache"
            )
        stream = self.clock.begin(self._host.observe(self.model, arguments))
        return None if self._text is None else self._with_short_text(arguments, stream, self._text)

    def end(self) -> None:
        """Notes that the root returns; warns after a run's last call if no layer was reduced in it."""
        stream = self.clock.end()
        is_positive = any(reduction.ratio > 0 for reduction in self.reductions.values())
        if stream is not None and stream.num_reduced == 0 and is_positive:
            warnings.warn(_no_effect(stream.step + 1), NoEffectWarning, stacklevel=2)

    def _with_short_text(
        self, arguments: dict[str, Any], stream: Stream, form: TextForm
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """The root's arguments with merged text, which is made once per prompt; None where nothing was merged."""
        if stream.text is None:
            lost = [name for name in self._text_layers if self.is_lost(name)]
            if lost and self.reducer.text_ratio is not None:
                raise ValueError(f"text cannot be weighed at {lost[0]}, which a later call took; gen_turbo.reattach")
            stream.text = MergedText({}) if lost else merge_text(arguments, form, self.reducer.text_ratio)
        text = stream.text
        if not text.num_merged:
            return None
        stream.observation = replace(
            stream.observation, num_text=text.num_text, text_sizes=text.sizes, num_merged_text=text.num_merged
        )
        num_own = text.num_text - form.num_before
        self.text_tokens = num_own + text.num_merged, num_own
        return (), {**arguments, **text.arguments}

    def is_lost(self, name: str) -> bool:
        """Whether a later call put another processor in a binding's place."""
        if name not in self.bindings:
            return False
        model = self.model
        return binding_of(_processor(model, name), model.get_submodule(name)) is not self.bindings[name]

    def remove(self) -> None:
        """Puts every processor back that is still ours and takes the hooks off; doing it twice is harmless."""
        model = self._model()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for projection in self._projections if self._is_installed else ():
            projection.remove()
        self.clock.forget()
        if model is None or not self._is_installed:
            return
        self._is_installed = False
        for name, binding in self.bindings.items():
            if not self.is_lost(name):
                _set_processor(model, name, binding.inner)
            unbind(binding)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that are reduced."""
        return tuple(self.reductions)

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now for corrected reduction."""
        return self.clock.num_bytes

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once so far."""
        return self.clock.most_bytes

    def rows(self) -> list[LayerReport]:
        """One row per attention layer, reduced or not."""
        return [self._row(layer, self.reductions.get(layer.name)) for layer in self.layers]

    def _row(self, layer: Layer, reduction: Reduction | None) -> LayerReport:
        if reduction is None:
            return LayerReport(layer.name, layer.downsample, layer.left_alone or "level not chosen")
        stats = reduction.stats
        return LayerReport(
            layer.name,
            layer.downsample,
            "lost" if self.is_lost(layer.name) else "reduced",
            stats.grid,
            stats.num_tokens,
            stats.num_kept,
            stats.num_full,
            stats.num_reduced,
            stats.flops,
            stats.stock_flops,
            stats.plan_age,
        )


def _no_effect(num_steps: int) -> str:
    return (
        f"no token was removed in this run of {num_steps} steps: every step ran in full; take more steps, a smaller "
        "`warmup_steps`, a larger `memory_limit_mb`, or restore='copy'"
    )


def _passive(layer: Layer) -> Layer:
    return layer if layer.left_alone else replace(layer, left_alone="level not chosen")


def _is_free(model: nn.Module, layer: Layer) -> bool:
    """Whether a layer's processor has no weights, which would leave the module tree with it."""
    return not isinstance(_processor(model, layer.name), nn.Module)


def _processor(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name).processor


def _set_processor(model: nn.Module, name: str, processor: Any) -> None:
    layer: Any = model.get_submodule(name)
    if hasattr(layer, "set_processor"):
        layer.set_processor(processor)
    else:
        layer.processor = processor


def _cost(module: nn.Module) -> Cost:
    """Counts the linear weights that image tokens go through: not those of text, time or cross-attention's keys."""
    weights = sum(
        linear.weight.numel()
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and not any(part in name for part in _NOT_PER_TOKEN)
    )
    to_q = next((m for name, m in module.named_modules() if name.endswith("to_q") and isinstance(m, nn.Linear)), None)
    return Cost(weights, to_q.out_features if to_q is not None else 0)
