"""The gate before the language model: fewer image tokens enter it, with the positions, mask and cache that fit.

Shape names: B rows, L columns of the call, M of them that stay, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from gen_turbo.method import TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.cache import SHORTENED, ShortenedCache, shortened
from gen_turbo.vlm.cache_argument import cache_in, with_cache
from gen_turbo.vlm.call import CallState, begin, begin_anew, end
from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.family import Family, image_token_mask
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.layers import real_columns
from gen_turbo.vlm.masks import check_mask, deepstack, held, mask_2d, masks_by_kind, short_mask, uses_cache
from gen_turbo.vlm.origin import Seen, seen_images, tell_of_features
from gen_turbo.vlm.recorded import whole
from gen_turbo.vlm.run import Group, Images, Planner, Reduction, reduce
from gen_turbo.vlm.static import check_kernel, refuse_static
from gen_turbo.vlm.videos import Videos
from gen_turbo.vlm.words import Words


class _Sight:
    """What was seen last; images may be encoded before the call that reads them."""

    seen: CallState[Seen] = CallState(Seen)


class Gate:
    """The hooks on the base model and the language model, and what they know of the call that is running.

    Attributes:
        planner: Plans for the image tokens before the language model; None lets all of them pass.
        is_merged: Whether slots of image tokens and of words are averaged or only their anchors stay.
        videos: Finds the frames of videos.
        shared: The method whose budget images share, or that gives each its own; None where all have one.
        images: The image tokens of this call as the first decoder layer sees them; None where there are none.
        held: Columns that the first layer's cache held when this call began.
        length: Columns of this call that reach the first layer.
        real_BM: Which columns that reach the first layer, with those held, are no padding; None if all are.
        cuts: Columns that decoder layers of this call keep, by first layer, to be noted in the cache at the end.
        dropped: What spreads the output of the last decoder layer back; set by the decoder.
        words: Chooses words that leave with the image tokens of a prompt; None lets all of them pass.
        has_cut: Whether some of so many image tokens leave inside the language model.
        on_prompt: Receives the images, embeddings and mask of a call that brings images, before they are planned.
        joined: Stages whose state begins and ends with a call of the base model.
    """

    images: CallState[Images | None] = CallState(lambda: None)
    held: CallState[int] = CallState(int)
    length: CallState[int] = CallState(int)
    real_BM: CallState[Tensor | None] = CallState(lambda: None)
    cuts: CallState[dict[int, Columns]] = CallState(dict)
    dropped: CallState[Columns | None] = CallState(lambda: None)
    _here: CallState[Columns | None] = CallState(lambda: None)
    _total: CallState[Columns | None] = CallState(lambda: None)
    _given: CallState[dict[str, Any]] = CallState(dict)
    _features: CallState[list[Tensor]] = CallState(list)
    _is_running: CallState[bool] = CallState(bool)
    _seen_here: CallState[Seen | None] = CallState(lambda: None)

    def __init__(
        self, base: nn.Module, text: nn.Module, family: Family, planner: Planner | None, is_merged: bool
    ) -> None:
        self.planner, self.is_merged = planner, is_merged
        self.words: Words | None = None
        self.shared: TokenReducer | None = None
        self.on_reduction: Callable[[Images, Reduction], None] = lambda images, reduction: None
        self.has_cut: Callable[[int], bool] = lambda num_tokens: False
        self.on_prompt: Callable[[Images, Tensor, Any], None] = lambda images, embeds, mask: None
        self._base, self._text, self._family = base, text, family
        self._arguments = list(inspect.signature(base.forward).parameters)
        self._sight = _Sight()
        self.videos = Videos(base, family.frames)
        self.joined: list[object] = [self.videos]

    def install(self) -> Iterator[Any]:
        """Puts the hooks in place, one after the other, and gives the handle of each."""
        yield from self.videos.install()
        yield self._base.register_forward_pre_hook(self._before_base, with_kwargs=True)
        yield self._base.register_forward_hook(lambda module, args, output: self._end(), always_call=True)
        yield self._text.register_forward_pre_hook(self._before_text, with_kwargs=True)
        yield self._text.register_forward_hook(self._after_text, with_kwargs=True)

    def watch(self, note: Callable[[Seen], None]) -> InstanceMethod:
        """Stands before the base model's `get_image_features` so that the features of each image are seen."""
        signature = inspect.signature(self._base.get_image_features)  # type: ignore[arg-type]

        # What is noted belongs to this call: no compiled code may know of it. The tower itself may be compiled.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def see(output: Any, given: dict[str, Any]) -> None:
            images = self._images_of(output.pooler_output if hasattr(output, "pooler_output") else output)
            lengths = [len(features) for features in images]
            grids = self._family.grids or (lambda base, given, lengths: [None] * len(lengths))
            self.seen = Seen(images, grids(self._base, {**given, **given.get("kwargs", {})}, lengths))
            note(self.seen)
            if self._is_running:
                self._features = images

        def watched(get_image_features: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.videos.is_encoding:
                return get_image_features(*args, **kwargs)
            # As transformers reads it: the call's own word, then the configuration's.
            asked = kwargs.get("return_dict")
            is_tuple = (getattr(self._base.config, "return_dict", True) if asked is None else asked) is False
            output = get_image_features(*args, **(kwargs | {"return_dict": True} if is_tuple else kwargs))
            see(output, signature.bind_partial(*args, **kwargs).arguments)
            return output.to_tuple() if is_tuple else output

        apart = torch.compiler.disable(watched, recursive=False)  # type: ignore[no-untyped-call]
        return InstanceMethod(self._base, "get_image_features", apart)

    def _images_of(self, pooled: Any) -> list[Tensor]:
        """Features of each image on its own."""
        pieces = self._family.pieces
        if pieces is None:
            return list(pooled)
        most = pieces(self._base)
        return [one for features in pooled if len(features) for one in features.split(most)]

    @property
    def seen(self) -> Seen:
        """The images whose features were made last before the language model of this call ran."""
        return self._seen_here or self._sight.seen

    @seen.setter
    def seen(self, seen: Seen) -> None:
        begin_anew(self._sight)
        self._sight.seen = seen

    def _begin(self) -> None:
        for stage in (self, *self.joined):
            begin(stage)
        self._is_running, self.cuts = True, {}

    def _end(self) -> None:
        for stage in (self, *self.joined):
            end(stage)

    def _before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._begin()
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            self._features = self._images_of(encoded.pooler_output)
        has_images = encoded is not None or given.get("pixel_values") is not None
        has_videos = self.videos.are_in(given)
        if has_images or has_videos:
            self._given = {**given, "has_images": has_images, "has_videos": has_videos}
        else:
            tell_of_features(given)
        cache, mask = cache_in(given), given.get("attention_mask")
        if not self._family.masks_in_base or not isinstance(cache, ShortenedCache) or cache.columns is None:
            return None
        length = next(given[name].shape[1] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        columns = cache.columns.grown(cache.get_seq_length() + length)
        changed = {"attention_mask": mask_2d(columns, mask, True)}
        types = given.get("token_type_ids")
        if types is not None and types.shape[1] == columns.num_columns:
            # Types of the whole conversation, by which a mask looks up the columns that are held.
            changed["token_type_ids"] = columns.mask(types)
        return args, {**kwargs, **changed}

    def _images(self, embeds_BLC: Tensor) -> Images | None:
        given, device = self._given, embeds_BLC.device
        is_image = image_token_mask(self._base, given) if given.get("has_images") and self._features else None
        images = None if is_image is None else seen_images(is_image.to(device), self._features, self.seen)
        is_video = image_token_mask(self._base, given, "video") if given.get("has_videos") else None
        return self.videos.beside(images, None if is_video is None else is_video.to(device))

    def _before_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        cache = cache_in(kwargs)
        if cache is None and uses_cache(text, kwargs):
            cache = DynamicCache(config=text.config)
        if isinstance(cache, SHORTENED):
            cache.is_followed = True
        if self._given or not isinstance(cache, StaticCache):
            self.held = held(cache)
        self.length = embeds.shape[1]
        self._seen_here = self._sight.seen
        self.images = self._images(embeds)
        is_shortened, mask = isinstance(cache, SHORTENED) and cache.columns is not None, kwargs.get("attention_mask")
        if self.images is not None and any(map(self.has_cut, self.images.lengths)):
            refuse_static(cache)
        reduction = self._reduction(self.images, embeds, mask) if self.images is not None else None
        if reduction is not None or is_shortened:
            check_mask(mask)
        if reduction is not None:
            self._make_columns(reduction, mask, embeds, cache)
        if self._here is None and not is_shortened:
            self.real_BM = kwargs.get("attention_mask")
            return (args, with_cache(kwargs, cache)) if cache is not None else None
        changed = self._shortened(embeds, cache, kwargs, reduction)
        return args, {**with_cache(kwargs, cache), **changed}

    def _reduction(self, images: Images, embeds: Tensor, mask: Any) -> Reduction | None:
        """What is removed from a prompt; None where nothing can be."""
        self.on_prompt(images, embeds, mask)
        reduction = None if self.planner is None else reduce(images, embeds, self.planner, self.shared)
        if self.words is None:
            return reduction
        reduction = reduction or reduce(images, embeds, _pass_all)
        return self.words.added(reduction, self._given.get("input_ids"), real_columns(mask, embeds), embeds)

    def _make_columns(self, reduction: Reduction, mask: Any, embeds: Tensor, cache: Any) -> None:
        """Makes the rows of what stays; padding is removed too, but for what makes them of one length."""
        reduction.num_columns = embeds.shape[0] * embeds.shape[1]
        if not reduction.is_identity:
            if isinstance(mask, dict):
                mask = mask.get("full_attention")
            if isinstance(cache, StaticCache) and mask is not None and mask.ndim == 4:
                seen = int(cache.get_seq_length())
                mask = mask[..., seen : seen + embeds.shape[1]]
            keep = reduction.keep_BL if mask is None else reduction.keep_BL & real_columns(mask, embeds)
            self._here = Columns.of_kept(keep)
            reduction.num_columns = embeds.shape[0] * self._here.num_kept
        if self.images is not None and self.planner is not None:
            self.on_reduction(self.images, reduction)

    def _shortened(self, embeds: Tensor, cache: Any, kwargs: dict[str, Any], reduction: Reduction | None) -> Any:
        """The changed arguments of a call that brings fewer columns than tokens, or follows one that did."""
        cache = shortened(cache) if cache is not None else None
        if cache is not None:
            cache.is_followed = True
        batch, length = embeds.shape[:2]
        here, is_static = self._here, isinstance(cache, StaticCache)
        known = cache.columns if cache is not None else None
        changed: dict[str, Any] = {}
        mask = kwargs.get("attention_mask")
        if is_static and here is None:
            seen, self._total = 0, known
        else:
            seen = int(cache.get_seq_length()) if cache is not None else 0
            before = known.grown(seen) if known is not None else Columns.all_of(batch, seen, embeds.device)
            self._total = before.beside(here) if here is not None else before.grown(seen + length)
        assert self._total is not None
        if here is not None and reduction is not None:
            changed["inputs_embeds"] = here.take(reduction.apply(embeds, self.is_merged), 1)
        if is_static:
            kernel: Any = self._text.config._attn_implementation  # type: ignore[union-attr]
            check_kernel(kernel)
            is_added = kernel == "eager"
            masks = mask if isinstance(mask, dict) else {"": mask}
            entering = changed.get("inputs_embeds", embeds)
            made = {kind: cache.mask(one, self._total, here, entering, is_added) for kind, one in masks.items()}
            changed["attention_mask"] = made if isinstance(mask, dict) else made[""]
        elif isinstance(mask, dict):
            changed["attention_mask"] = masks_by_kind(mask, here, self._total, self.held, embeds, self._text.config)
        else:
            changed["attention_mask"] = short_mask(mask, here, self._total, self.held, cache is not None)
            self.real_BM = changed["attention_mask"]
        if here is None or reduction is None or self.images is None:
            return changed
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(seen, seen + length, device=embeds.device)[None]
        changed["position_ids"] = here.take(positions, -1, batch_dim=-2)
        if kwargs.get("visual_pos_masks") is not None:
            changed.update(deepstack(kwargs, reduction, here, self.is_merged))
        self.length = here.num_kept
        self.images = self.images.shortened(here, reduction)
        return changed

    def _after_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cache = cache_in(kwargs)
        if cache is not None and (self._total is not None or self.cuts):
            cache = shortened(cache)
            cache.columns = self._total if self._total is not None else cache.columns
            if self.cuts:
                cache.cuts = {**cache.cuts, **self.cuts}
        if isinstance(cache, SHORTENED):
            cache.is_followed = False
        whole(output, [columns for columns in (self.dropped, self._here) if columns is not None], self.held)
        self.dropped = self._here = None
        return output


def _pass_all(tokens: Tensor, group: Group) -> TokenMap:
    return TokenMap.identity(1, group.length, tokens.device)
