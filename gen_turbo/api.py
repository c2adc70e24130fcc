"""Installing a reducer on a model or a pipeline, and taking it off again object for object."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from gen_turbo.engine.base import NoEffectWarning as NoEffectWarning
from gen_turbo.engine.base import Part
from gen_turbo.engine.denoiser import DenoiserPart, LayerPruner
from gen_turbo.engine.followed import Followed, Record
from gen_turbo.engine.graphs import Mode
from gen_turbo.method import TokenReducer
from gen_turbo.models.unknown import UNKNOWN

_FAMILIES = {
    "diffusers.": "gen_turbo.models.families",
    "transformers.": "gen_turbo.vlm.attachment",
}
"""Where the tuple ADAPTERS is for the models of a library; imported when a model of that library is attached to."""
_DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder", "vlm")
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Callable[[], Part | None]] = weakref.WeakKeyDictionary()
_FOLLOWED: weakref.WeakSet[Followed] = weakref.WeakSet()
"""One for each pipeline that something is attached through; the pipelines hold them."""


class Attachment:
    """A reducer on every denoiser of a pipeline, or on one model. As a context manager it detaches at the end.

    Attributes:
        parts: One attachment per model.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are reduced; never empty."""
        return tuple(name for part in self.parts for name in part.layer_names)

    def detach(self) -> None:
        """Makes every model what it was, object for object; doing it twice is harmless."""
        for part in self.parts:
            _release(part)
        _unfollow()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def attach(target: Any, reducer: TokenReducer, *, replace: bool = False, graphs: Mode = "auto") -> Attachment:
    """Installs a reducer on a diffusers pipeline's denoisers or on one model.

    Args:
        target: A pipeline or a model, also inside of `torch.compile`, a `PeftModel` or data parallelism. What is
            attached to a model alone stays with that model and knows of no pipeline: where another one takes its place
            in a pipeline, that one runs as stock, without a warning. Of a pipeline that was attached to, runs warn.
        reducer: A processor, such as `TurboProcessor(0.4)`.
        replace: Whether a reducer that is attached already gives way; otherwise that is an error.
        graphs: Whether calls of a denoiser on a GPU are captured in CUDA graphs, one for each kind of step: "auto"
            keeps those that measure faster in the first steps, True keeps all, False captures nothing. Replaying is
            bit-identical to running. `IdentityProcessor` with graphs is the stock model, launched at once.

    Returns:
        The attachment, which detaches.

    Raises:
        TypeError: If `reducer` is no token reducer or `target` is neither a pipeline nor a model.
        ValueError: If no family takes the model, a setting does not fit it, no layer would be reduced, or a reducer is
            attached already. Nothing was changed then.
    """
    if not isinstance(reducer, TokenReducer):
        raise TypeError(f"expected a processor such as TurboProcessor(0.4), got {reducer!r}")
    if graphs not in ("auto", True, False):
        raise ValueError(f"graphs must be 'auto', True or False; got {graphs!r}")
    pipeline, models = denoisers(target)
    before = _parts(models)
    if before and not replace:
        raise ValueError(
            f"{type(before[0].model).__name__} already has a {type(before[0].reducer).__name__} attached; "
            "call gen_turbo.detach first"
        )
    return _exchanged(before, [(model, reducer, graphs) for model in models], pipeline)


def reattach(target: Any) -> Attachment:
    """Attaches what is attached once more, to the layers as they are now.

    Settings that reach into attention (`kv_only`, `proportional_attention`, `text_ratio`, `attention_backend`) are
    checked against the processors that the layers have now.

    Returns:
        The new attachment, in place of the old one.

    Raises:
        TypeError: If `target` is neither a pipeline nor a model.
        ValueError: If nothing is attached, or the reducer does not fit the layers now. Nothing was changed then.
    """
    pipeline, models = denoisers(target)
    before = _parts(models)
    if not before:
        raise ValueError(f"nothing is attached to this {type(target).__name__}; call gen_turbo.attach")
    return _exchanged(before, [(part.model, part.reducer, getattr(part, "graphs", False)) for part in before], pipeline)


def detach(target: Any) -> None:
    """Takes the reducer off a pipeline or model; without one, nothing happens.

    Of a pipeline also off models that were replaced in it after they were attached through it. The model then holds the
    very objects that it held before.

    Raises:
        TypeError: If `target` is neither a pipeline nor a model.
    """
    followed = _followed(target)
    try:
        parts = attachments(target)
    except TypeError:
        # A pipeline that has given its model away.
        if followed is None:
            raise
        parts = []
    if followed is not None:
        parts += [part for record in followed.records if (part := record.part()) is not None]
        followed.records = []
    for part in parts:
        _release(part)
    _unfollow()


def attachments(target: Any) -> list[Part]:
    """What is attached to a pipeline's denoisers or to a model."""
    return _parts(denoisers(target)[1])


def replaced(target: Any) -> list[str]:
    """A sentence for each model of a pipeline that has taken the place of one that was attached to through it."""
    followed = _followed(target)
    return followed.replaced() if followed is not None else []


def denoisers(target: Any) -> tuple[Any | None, list[nn.Module]]:
    """Gives the pipeline, if `target` is one, and the models in it that denoise; never the autoencoder.

    Raises:
        TypeError: If the target is neither a model nor a pipeline with a denoiser.
    """
    if isinstance(target, nn.Module):
        return None, [_unwrapped(target)]
    models = [getattr(target, name, None) for name in _DENOISERS if name in getattr(target, "components", {})]
    found = [_unwrapped(model) for model in models if isinstance(model, nn.Module)]
    if not found:
        got = type(target).__name__
        raise TypeError(f"expected a diffusers pipeline with one of {_DENOISERS} or a model, got {got}")
    return target, found


def denoiser(target: Any) -> nn.Module:
    """The model that denoises, the first where a pipeline has several; raises TypeError as `denoisers`."""
    return denoisers(target)[1][0]


def _exchanged(
    before: list[Part], wanted: list[tuple[nn.Module, TokenReducer, Mode]], pipeline: Any | None
) -> Attachment:
    """Takes parts off and installs others; if one of those cannot be, the first are back."""
    found = [_adapter_for(model, reducer) for model, reducer, _ in wanted]
    records = [(followed, followed.records) for followed in _FOLLOWED]
    for part in before:
        _release(part)
    parts: list[Part] = []
    try:
        for one, adapter in zip(wanted, found, strict=True):
            parts.append(_part(adapter, *one, pipeline))
        roots = [part.root for part in parts if isinstance(part, DenoiserPart)]
        for root in roots:
            # Models that share the steps of a run, as those of Wan 2.2 do, end it together.
            root.siblings = [other for other in roots if other is not root]
        _install(parts)
    except BaseException:
        for part in parts:
            _release(part)
        _install(before)
        for followed, known in records:
            followed.records = known
        raise
    if pipeline is not None:
        _follow(pipeline, parts)
    _unfollow()
    return Attachment(parts)


def _adapter_for(model: nn.Module, reducer: TokenReducer) -> Any:
    """The family of a model; for a reducer that skips whole calls, any model with a time argument."""
    try:
        return adapter_of(model)
    except ValueError:
        if isinstance(reducer, LayerPruner) and UNKNOWN.takes(model):
            return UNKNOWN
        raise


def _part(adapter: Any, model: nn.Module, reducer: TokenReducer, graphs: Mode, pipeline: Any | None) -> Part:
    """Prepares a reducer for one model and changes nothing yet."""
    if hasattr(adapter, "attachment"):
        part: Part = adapter.attachment(model, reducer, pipeline)
        return part
    return DenoiserPart(model, adapter, reducer, pipeline, graphs)


def _parts(models: list[nn.Module]) -> list[Part]:
    found = [_ATTACHED[model]() for model in models if model in _ATTACHED]
    return [part for part in found if part is not None]


def _release(part: Part) -> None:
    """Takes one part off its model; a part that is off already changes nothing."""
    part.remove()
    for followed in list(_FOLLOWED):
        followed.forget(part)
    for model in [model for model, other in _ATTACHED.items() if other() is part]:
        del _ATTACHED[model]


def _install(parts: list[Part]) -> None:
    for part in parts:
        part.install()
        _ATTACHED[part.model] = part.reference()


def _followed(target: Any) -> Followed | None:
    return next((followed for followed in list(_FOLLOWED) if followed.pipeline is target), None)


def _follow(pipeline: Any, parts: list[Part]) -> None:
    """Has a pipeline's runs say so where a model takes the place of an attached one."""
    followed = _followed(pipeline) or Followed(pipeline, lambda model: _unwrapped(model) in _ATTACHED)
    _FOLLOWED.add(followed)
    followed.records = [record for record in followed.records if record.part() is not None]
    for name in _DENOISERS:
        model = getattr(pipeline, name, None)
        attached = [part for part in parts if isinstance(model, nn.Module) and part.model is _unwrapped(model)]
        followed.records += [Record(name, type(part.reducer).__name__, part.reference()) for part in attached]


def _unfollow() -> None:
    """Gives pipelines their own back to which nothing is attached any more."""
    for followed in [followed for followed in _FOLLOWED if not followed.records]:
        _FOLLOWED.discard(followed)
        followed.remove()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile`, peft and data parallelism return; of one that speaks, what reads."""
    while True:
        found: Any = getattr(model, "_orig_mod", None) or getattr(model, "thinker", None)
        if found is None and type(model).__module__.startswith("peft."):
            found = model.get_base_model()  # type: ignore[operator]
        if found is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            found = model.module
        if found is None or found is model:
            return model
        model = found


def adapter_of(model: nn.Module) -> Any:
    """Finds the family by the names of the model's class and its bases, importing only the library they come from.

    Raises:
        ValueError: If no family takes the model.
    """
    bases = [cls for cls in type(model).__mro__ if cls.__module__.startswith(tuple(_FAMILIES))]
    for cls in bases:
        for adapter in _adapters(cls.__module__.split(".")[0] + "."):
            if cls.__name__ in adapter.models:
                return adapter
    from gen_turbo.models.families import REFUSED

    for cls in bases:
        if cls.__name__ in REFUSED:
            raise ValueError(f"{cls.__name__} cannot be reduced: {REFUSED[cls.__name__]}")
    libraries = [prefix for prefix in _FAMILIES if any(cls.__module__.startswith(prefix) for cls in bases)]
    known = ", ".join(
        name for prefix in libraries or _FAMILIES for adapter in _adapters(prefix) for name in adapter.models
    )
    raise ValueError(f"{type(model).__name__} is not supported; supported: {known}")


def _adapters(prefix: str) -> tuple[Any, ...]:
    adapters: tuple[Any, ...] = import_module(_FAMILIES[prefix]).ADAPTERS
    return adapters
