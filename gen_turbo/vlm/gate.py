"""The gate before the language model: fewer image tokens enter it, with the positions, mask and cache that fit.

Shape names: B rows, L columns of the call, M of them that stay, C channels.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.method import TokenReducer
from gen_turbo.vlm.cache import SHORTENED, ShortenedCache, shortened
from gen_turbo.vlm.cache_argument import cache_in, with_cache
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.family import Family, image_token_mask
from gen_turbo.vlm.images import Images, seen_images
from gen_turbo.vlm.masks import (
    check_mask,
    deepstack,
    held,
    mask_2d,
    masks_by_kind,
    per_token,
    real_columns,
    short_mask,
    uses_cache,
    weighed,
    widest,
)
from gen_turbo.vlm.recorded import whole
from gen_turbo.vlm.run import Listener, Planner, Reduction, pass_all, reduce
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.sight import Sight
from gen_turbo.vlm.stage import Handle, Stage
from gen_turbo.vlm.static import check_kernel, refuse_static
from gen_turbo.vlm.videos import Videos, with_frames
from gen_turbo.vlm.words import Words


class Gate(Stage):
    """Before the language model: what begins and ends a call, and lets fewer image tokens in.

    Attributes:
        listeners: Receive what is removed of every prompt with images.

    Args:
        base: The base model.
        text: The language model.
        family: The family.
        calls: The calls of the base model.
        sight: Knows the images whose features were made.
        videos: Finds the frames of videos.
        planner: Plans for the image tokens; None lets all of them pass.
        is_merged: Whether slots of image tokens and of words are averaged, or only their anchors stay.
        is_weighed: Whether keys weigh by how many tokens they stand for.
        shared: The method whose budget images share, or that gives each its own; None where all have one.
        words: Chooses words that leave with the image tokens of a prompt; None lets all of them pass.
        removes_later: Whether some of so many image tokens are removed inside the language model.
        on_prompt: Receives the images, embeddings and mask of a call that brings images, before they are planned.
    """

    def __init__(
        self,
        base: nn.Module,
        text: nn.Module,
        family: Family,
        calls: Calls[Running],
        sight: Sight,
        videos: Videos,
        planner: Planner | None,
        *,
        is_merged: bool = False,
        is_weighed: bool = False,
        shared: TokenReducer | None = None,
        words: Words | None = None,
        removes_later: Callable[[int], bool] | None = None,
        on_prompt: Callable[[Images, Tensor, Any], None] | None = None,
    ) -> None:
        self.listeners: list[Listener] = []
        self._base, self._text, self._family, self._calls = base, text, family, calls
        self._sight, self._videos, self._words = sight, videos, words
        self._planner, self._is_merged, self._shared = planner, is_merged, shared
        self._is_weighed = is_weighed
        self._removes_later, self._on_prompt = removes_later, on_prompt
        self._arguments = list(inspect.signature(base.forward).parameters)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts the hooks on the base model and the language model."""
        yield self._base.register_forward_pre_hook(self._before_base, with_kwargs=True)
        yield self._base.register_forward_hook(lambda module, args, output: self._calls.end(), always_call=True)
        yield self._text.register_forward_pre_hook(self._before_text, with_kwargs=True)
        yield self._text.register_forward_hook(self._after_text, with_kwargs=True)
        yield self._text.register_forward_hook(lambda module, args, output: self._end_text(), always_call=True)

    def _before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls.begin()
        call.seen = self._sight.last.value
        given = {**dict(zip(self._arguments[: len(args)], args, strict=True)), **kwargs}
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            call.features = self._sight.images_of(encoded)
        call.has_images = encoded is not None or given.get("pixel_values") is not None
        call.has_videos = self._videos.are_in(given)
        if call.has_images or call.has_videos:
            call.given = given
        else:
            _tell_of_features(given)
        cache, mask = cache_in(given), given.get("attention_mask")
        if not self._family.masks_in_base or not isinstance(cache, ShortenedCache) or cache.columns is None:
            return None
        length = next(given[name].shape[1] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        columns = cache.columns.grown(cache.get_seq_length() + length)
        changed = {"attention_mask": mask_2d(columns, mask, True)}
        for name in ("token_type_ids", "mm_token_type_ids"):
            types = given.get(name)
            if types is not None and types.shape[1] == columns.num_columns:
                # Types of the whole conversation, by which a mask looks up the columns that are held.
                changed[name] = columns.mask(types)
        return args, {**kwargs, **changed}

    def _images(self, call: Running, embeds_BLC: Tensor) -> Images | None:
        device = embeds_BLC.device
        is_image = image_token_mask(self._base, call.given) if call.has_images and call.features else None
        if is_image is not None and is_image.device != device:
            is_image = is_image.to(device)
        images = None if is_image is None else seen_images(is_image, call.features, call.seen)
        is_video = image_token_mask(self._base, call.given, self._family.placeholder) if call.has_videos else None
        return images if is_video is None else with_frames(images, is_video.to(device), call.frames)

    def _before_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if not self._calls.is_running or self._calls.now.is_reading:
            self._calls.begin().is_bare = True
        call = self._calls.now
        call.is_reading = True
        if embeds is None:
            return None
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        if cache is None and uses_cache(text, kwargs):
            cache = DynamicCache(config=text.config)
        if isinstance(cache, SHORTENED):
            cache.is_followed = True
        if call.given or not isinstance(cache, StaticCache):
            call.held = held(cache)
        call.length = embeds.shape[1]
        call.images = images = self._images(call, embeds)
        is_shortened = isinstance(cache, SHORTENED) and cache.columns is not None
        if images is not None and self._removes_later is not None and any(map(self._removes_later, images.lengths)):
            refuse_static(cache)
        reduction = None if images is None else self._reduction(call, images, embeds, mask)
        if reduction is not None or is_shortened:
            check_mask(mask)
        if images is not None and reduction is not None:
            self._make_columns(call, images, reduction, mask, embeds, cache)
        if call.here is None and not is_shortened:
            call.real_BM = mask
            return (args, with_cache(kwargs, cache)) if cache is not None else None
        return args, {**with_cache(kwargs, cache), **self._shortened(call, embeds, cache, kwargs, reduction)}

    def _reduction(self, call: Running, images: Images, embeds: Tensor, mask: Any) -> Reduction | None:
        """What is removed from a prompt; None where nothing can be."""
        if self._on_prompt is not None:
            self._on_prompt(images, embeds, mask)
        reduction = None if self._planner is None else reduce(images, embeds, self._planner, self._shared)
        if self._words is None:
            return reduction
        reduction = reduction or reduce(images, embeds, pass_all)
        return self._words.added(reduction, call.given.get("input_ids"), real_columns(mask, embeds), embeds)

    def _make_columns(
        self, call: Running, images: Images, reduction: Reduction, mask: Any, embeds: Tensor, cache: Any
    ) -> None:
        """Makes the rows of what stays; padding is removed too, but for what makes them of one length."""
        reduction.num_columns = embeds.shape[0] * embeds.shape[1]
        if not reduction.is_identity:
            mask = widest(mask)
            if isinstance(cache, StaticCache) and mask is not None and mask.ndim == 4:
                seen = int(cache.get_seq_length())
                mask = mask[..., seen : seen + embeds.shape[1]]
            keep = reduction.keep_BL if mask is None else reduction.keep_BL & real_columns(mask, embeds)
            call.here = Columns.of_kept(keep)
            if self._is_weighed:
                call.here = call.here.weighed(reduction.log_sizes())
            reduction.num_columns = embeds.shape[0] * call.here.num_kept
        if self._planner is not None:
            for listener in self.listeners:
                listener(0, images, reduction)

    def _shortened(
        self, call: Running, embeds: Tensor, cache: Any, kwargs: dict[str, Any], reduction: Reduction | None
    ) -> dict[str, Any]:
        """The changed arguments of a call that brings fewer columns than tokens, or follows one that did."""
        cache = shortened(cache) if cache is not None else None
        if cache is not None:
            cache.is_followed = True
        here, is_static = call.here, isinstance(cache, StaticCache)
        changed: dict[str, Any] = {}
        mask = kwargs.get("attention_mask")
        seen, total = _seen_and_total(call, cache, embeds)
        call.total = total
        if here is not None and reduction is not None:
            changed["inputs_embeds"] = here.take(reduction.apply(embeds, self._is_merged), 1)
        if is_static:
            kernel: Any = self._text.config._attn_implementation  # type: ignore[union-attr]
            check_kernel(kernel)
            is_added = kernel == "eager"
            masks = mask if isinstance(mask, dict) else {"": mask}
            entering = changed.get("inputs_embeds", embeds)
            made = {kind: cache.mask(one, total, here, entering, is_added) for kind, one in masks.items()}
            changed["attention_mask"] = made if isinstance(mask, dict) else made[""]
        elif isinstance(mask, dict):
            changed["attention_mask"] = masks_by_kind(mask, here, total, call.held, embeds, self._text.config)
        else:
            changed["attention_mask"] = short_mask(mask, here, total, call.held, cache is not None)
            call.real_BM = changed["attention_mask"]
        if total.log_size_BM is not None:
            entering, mask = changed.get("inputs_embeds", embeds), changed["attention_mask"]
            is_dict = isinstance(mask, dict)
            made = {kind: weighed(one, total, entering) for kind, one in (mask if is_dict else {"": mask}).items()}
            changed["attention_mask"] = made if is_dict else made[""]
        if here is None or reduction is None or call.images is None:
            return changed
        positions = kwargs.get("position_ids")
        if positions is None:
            changed["position_ids"] = here.index_BM + seen if seen else here.index_BM
        else:
            changed["position_ids"] = here.take(positions, -1, batch_dim=-2)
        changed.update(per_token(kwargs, here))
        if kwargs.get("visual_pos_masks") is not None:
            changed.update(deepstack(kwargs, reduction, here, self._is_merged))
        call.length = here.num_kept
        call.images = call.images.shortened(here, reduction.lengths())
        return changed

    def _after_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call, cache = self._calls.now, cache_in(kwargs)
        if cache is not None and (call.total is not None or call.cuts):
            cache = shortened(cache)
            cache.columns = call.total if call.total is not None else cache.columns
            if call.cuts:
                cache.cuts = {**cache.cuts, **call.cuts}
        if isinstance(cache, SHORTENED):
            cache.is_followed = False
        whole(output, [columns for columns in (call.left, call.here) if columns is not None], call.held)
        return output

    def _end_text(self) -> None:
        self._calls.now.is_reading = False
        if self._calls.now.is_bare:
            self._calls.end()


def _seen_and_total(call: Running, cache: Any, embeds: Tensor) -> tuple[int, Columns]:
    """How many tokens a cache has seen, and which of all tokens the first layer holds once the call has run."""
    here, known = call.here, cache.columns if cache is not None else None
    if here is None and known is not None and isinstance(cache, StaticCache):
        return 0, known
    batch, length = embeds.shape[:2]
    seen = call.held + cache.num_dropped if call.held else 0
    if here is not None and known is None and not seen:
        return seen, here
    before = known.grown(seen) if known is not None else Columns.all_of(batch, seen, embeds.device)
    return seen, before.beside(here) if here is not None else before.grown(seen + length)


def _tell_of_features(given: dict[str, Any]) -> None:
    """Warns where a call without images brings embeddings in which there may be image features."""
    embeds = given.get("inputs_embeds")
    if given.get("input_ids") is None and embeds is not None and embeds.shape[1] > 1:
        warnings.warn(
            "a prompt came as inputs_embeds alone: images that are in it already are read in full; pass pixel_values, "
            "or image features as mm_encoder_outputs, to have their tokens reduced",
            NoEffectWarning,
            stacklevel=3,
        )
