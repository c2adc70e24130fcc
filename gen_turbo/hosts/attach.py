"""Installing a reducer on a model or a pipeline, and taking it off again object for object."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.contract import TokenReducer
from gen_turbo.hosts.base import Host, Layer
from gen_turbo.hosts.bind import Binding, BoundProcessor, bound_processor
from gen_turbo.hosts.clock import Clock, RunFacts
from gen_turbo.hosts.diffusion.unet import UNetHost

HOSTS: tuple[Host, ...] = (UNetHost(),)
_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, ModelAttachment] = weakref.WeakKeyDictionary()


class NoEffectWarning(UserWarning):
    """A whole run went by without one reduced layer."""


class ModelAttachment:
    """A reducer on one model: the bindings, the hooks, and what was there before."""

    def __init__(self, model: nn.Module, host: Host, reducer: TokenReducer, pipeline: Any | None) -> None:
        self.layers = host.layers(model)
        self.clock = Clock(_run_facts_of(pipeline))
        self._model = weakref.ref(model)
        self._host = host
        self._handles: list[RemovableHandle] = []
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
        _ATTACHED[self.model] = self

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
        if model is None or _ATTACHED.get(model) is not self:
            return
        for binding in self.bindings:
            if not self.is_lost(binding):
                model.get_submodule(binding.layer.name).set_processor(binding.inner)  # type: ignore[operator]
        del _ATTACHED[model]


class Attachment:
    """A reducer on every denoiser of a pipeline, or on one model. As a context manager it detaches at the end.

    Attributes:
        parts: One attachment per model.
    """

    def __init__(self, parts: list[ModelAttachment]) -> None:
        self.parts = parts

    @property
    def sites(self) -> tuple[str, ...]:
        """The layers that are reduced; never empty."""
        return tuple(binding.layer.name for part in self.parts for binding in part.bindings)

    def detach(self) -> None:
        """Makes every model what it was, object for object; doing it twice is harmless."""
        for part in self.parts:
            part.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def attach(target: Any, reducer: TokenReducer, *, replace: bool = False) -> Attachment:
    """Installs a reducer on a diffusers pipeline's denoisers or on one model.

    Args:
        target: A pipeline or a model.
        reducer: A processor, such as `TurboProcessor(0.4)`.
        replace: Whether a reducer that is attached already gives way; otherwise that is an error.

    Returns:
        The attachment, which detaches.

    Raises:
        TypeError: If `reducer` is no token reducer or `target` is neither a pipeline nor a model.
        ValueError: If no host takes the model, no layer would be reduced, or a reducer is attached already.
            Nothing was changed then.
    """
    if not isinstance(reducer, TokenReducer):
        raise TypeError(f"expected a processor such as TurboProcessor(0.4), got {reducer!r}")
    pipeline, models = denoisers(target)
    attached = [model for model in models if model in _ATTACHED]
    if attached and not replace:
        raise ValueError(
            f"{type(attached[0]).__name__} already has a {type(_ATTACHED[attached[0]].reducer).__name__} attached; "
            "call gen_turbo.detach first"
        )
    hosts = [_host_of(model) for model in models]
    before = [_ATTACHED[model] for model in attached]
    for part in before:
        part.remove()
    try:
        parts = [ModelAttachment(m, host, reducer, pipeline) for m, host in zip(models, hosts, strict=True)]
    except Exception:
        for part in before:
            part.install()
        raise
    for part in parts:
        part.install()
    return Attachment(parts)


def detach(target: Any) -> None:
    """Takes the reducer off a pipeline or model; without one, nothing happens."""
    for model in denoisers(target)[1]:
        if model in _ATTACHED:
            _ATTACHED[model].remove()


def attachments(target: Any) -> list[ModelAttachment]:
    """What is attached to a pipeline's denoisers or to a model."""
    return [_ATTACHED[model] for model in denoisers(target)[1] if model in _ATTACHED]


def denoisers(target: Any) -> tuple[Any | None, list[nn.Module]]:
    """Gives the pipeline, if `target` is one, and the models in it that denoise; never the autoencoder.

    Raises:
        TypeError: If the target is neither a model nor a pipeline with a denoiser.
    """
    if isinstance(target, nn.Module):
        return None, [target]
    models = [getattr(target, name, None) for name in _DENOISERS if name in getattr(target, "components", {})]
    found = [model for model in models if isinstance(model, nn.Module)]
    if not found:
        got = type(target).__name__
        raise TypeError(f"expected a diffusers pipeline with one of {_DENOISERS} or a model, got {got}")
    return target, found


def _no_effect(num_steps: int) -> str:
    return (
        f"no token was removed in this run of {num_steps} steps: every step ran in full; take more steps, a smaller "
        "`warmup`, a larger `memory_limit_mb`, or restore='copy'"
    )


def _host_of(model: nn.Module) -> Host:
    for host in HOSTS:
        if host.accepts(model):
            return host
    known = ", ".join(getattr(host, "name", type(host).__name__) for host in HOSTS)
    raise ValueError(f"{type(model).__name__} is not supported; supported: {known}")


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
