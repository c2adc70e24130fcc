"""A reducer on one diffusers denoiser: which layers it takes, the hooks at the root, and the way back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.contract import TokenReducer
from gen_turbo.hosts.base import DenoiserHost, Layer, SiteReport
from gen_turbo.hosts.bind import Binding, BoundProcessor, bound_processor
from gen_turbo.hosts.clock import Clock, RunFacts


class NoEffectWarning(UserWarning):
    """A whole run went by without one reduced layer."""


class DenoiserPart:
    """A reducer on one denoiser: the bindings, the hooks, and what was there before."""

    def __init__(self, model: nn.Module, host: DenoiserHost, reducer: TokenReducer, pipeline: Any | None) -> None:
        self.layers = host.layers(model)
        self.clock = Clock(_run_facts_of(pipeline))
        self._model = weakref.ref(model)
        self._host = host
        self._handles: list[RemovableHandle] = []
        self._is_installed = False
        ratios = _ratios_by_level(reducer, self.layers, type(model).__name__)
        claimed = [layer for layer in self.layers if not layer.left_alone and layer.downsample in ratios]
        self.bindings = [
            Binding(layer, _processor(model, layer), reducer, ratios[layer.downsample], host, self.clock, index)
            for index, layer in enumerate(claimed)
        ]
        self.reducer = reducer

    @property
    def model(self) -> nn.Module:
        """The model; raises ReferenceError once it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this attachment no longer exists")
        return model

    def install(self) -> None:
        """Puts the bound processors and the two root hooks in place."""
        for binding in self.bindings:
            self.model.get_submodule(binding.layer.name).set_processor(bound_processor(binding))  # type: ignore[operator]
        clock, host = self.clock, self._host

        def before(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            clock.begin(host.observe(args, kwargs))

        is_positive = any(binding.ratio > 0 for binding in self.bindings)

        def after(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            ended = clock.end()
            if ended is not None and ended.num_reduced == 0 and is_positive:
                warnings.warn(_no_effect(ended.step + 1), NoEffectWarning, stacklevel=2)

        self._handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after),
        ]
        self._is_installed = True

    def is_lost(self, binding: Binding) -> bool:
        """Whether a later call put another processor in a binding's place."""
        current = _processor(self.model, binding.layer)
        return not isinstance(current, BoundProcessor) or current.binding is not binding

    def remove(self) -> None:
        """Puts every processor back that is still ours and takes the hooks off; doing it twice is harmless."""
        model = self._model()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clock.forget()
        if model is None or not self._is_installed:
            return
        self._is_installed = False
        for binding in self.bindings:
            if not self.is_lost(binding):
                model.get_submodule(binding.layer.name).set_processor(binding.inner)  # type: ignore[operator]

    @property
    def site_names(self) -> tuple[str, ...]:
        """The layers that are reduced."""
        return tuple(binding.layer.name for binding in self.bindings)

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now for corrected reduction."""
        return self.clock.num_bytes

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once so far."""
        return self.clock.most_bytes

    def rows(self) -> list[SiteReport]:
        """One row per attention layer, reduced or not."""
        bindings = {binding.layer.name: binding for binding in self.bindings}
        return [self._row(layer, bindings.get(layer.name)) for layer in self.layers]

    def _row(self, layer: Layer, binding: Binding | None) -> SiteReport:
        if binding is None:
            return SiteReport(layer.name, layer.downsample, layer.left_alone or "level not chosen")
        stats = binding.stats
        return SiteReport(
            layer.name,
            layer.downsample,
            "lost" if self.is_lost(binding) else "reduced",
            stats.grid,
            stats.num_tokens,
            stats.num_kept,
            stats.num_full,
            stats.num_reduced,
            stats.flops,
            stats.stock_flops,
        )


def _no_effect(num_steps: int) -> str:
    return (
        f"no token was removed in this run of {num_steps} steps: every step ran in full; take more steps, a smaller "
        "`warmup`, a larger `memory_limit_mb`, or restore='copy'"
    )


def _processor(model: nn.Module, layer: Layer) -> Any:
    return model.get_submodule(layer.name).processor


def _ratios_by_level(reducer: TokenReducer, layers: list[Layer], model_name: str) -> dict[int, float]:
    """The ratio of each downsample factor that is reduced."""
    levels = sorted({layer.downsample for layer in layers if not layer.left_alone})
    if not levels:
        raise ValueError(f"this {model_name} has no self-attention in transformer blocks; nothing can be reduced")
    unknown = sorted(set(reducer.ratios) - set(levels))
    if unknown:
        raise ValueError(f"ratios names downsample factors {unknown}, but {model_name} has attention at {levels}")
    chosen = dict.fromkeys(levels[: reducer.num_levels], reducer.ratio) | reducer.ratios
    if not chosen:
        raise ValueError("num_levels=0 and no ratios: no layer would be reduced; name a level")
    return chosen


def _run_facts_of(pipeline: Any | None) -> Any:
    """A function that reads scheduler and guidance of a pipeline, without keeping the pipeline alive."""
    if pipeline is None or getattr(pipeline, "scheduler", None) is None:
        return lambda: None
    reference = weakref.ref(pipeline)
    last: list[Any] = [None, 0.0]

    def read() -> RunFacts | None:
        owner = reference()
        times = getattr(owner.scheduler, "timesteps", None) if owner is not None else None
        if times is None or len(times) == 0:
            return None
        if last[0] is not times:
            last[:] = [times, float(times[-1])]
        return RunFacts(times, last[1], bool(getattr(owner, "do_classifier_free_guidance", False)))

    return read
