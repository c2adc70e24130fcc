"""Seeing the images whose features are made: their grids, and what the vision tower knows of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.vlm.call import Calls, Last
from gen_turbo.vlm.family import Family
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.images import Encoded, Seen
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.stage import Encoder, Handle, Stage
from gen_turbo.vlm.videos import Videos


class Sight(Stage):
    """Stands before the base model's `get_image_features`, which may be called before the call that reads the images.

    Attributes:
        last: What is known of the images whose features were made last.

    Args:
        base: The base model.
        family: Its family.
        calls: The calls of the base model.
        videos: Knows whether frames of a video are encoded, as images are in some families.
        encoder: Knows the images; None where nothing does.
    """

    def __init__(
        self,
        base: nn.Module,
        family: Family,
        calls: Calls[Running],
        videos: Videos,
        encoder: Encoder | None = None,
    ) -> None:
        self.last: Last[Seen] = Last(Seen)
        self._base, self._family, self._calls = base, family, calls
        self._videos, self._encoder = videos, encoder
        self._watched: Calls[None] = Calls(lambda: None)

    @property
    def num_bytes(self) -> int:
        """Bytes held between the calls of the model."""
        return self.last.value.num_bytes

    def forget(self) -> None:
        """Drops what is known of images."""
        self.last.forget()

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Takes the place of `get_image_features`."""
        signature = inspect.signature(self._base.get_image_features)  # type: ignore[arg-type]

        # What is noted belongs to this call: no compiled code may know of it. The tower itself may be compiled.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def see(output: Any, given: dict[str, Any]) -> None:
            images = self.images_of(output)
            lengths = [len(features) for features in images]
            grids = self._family.grids or (lambda base, given, lengths: [None] * len(lengths))
            found = grids(self._base, {**given, **given.get("kwargs", {})}, lengths)
            known = self._encoder.encoded() if self._encoder is not None else Encoded()
            self.last.value = seen = Seen(known.plans, known.values, images, found)
            if self._calls.is_running:
                self._calls.now.features, self._calls.now.seen = images, seen

        def watched(get_image_features: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._videos.is_encoding:
                return get_image_features(*args, **kwargs)
            # As transformers reads it: the call's own word, then the configuration's.
            asked = kwargs.get("return_dict")
            is_tuple = (getattr(self._base.config, "return_dict", True) if asked is None else asked) is False
            # A hook between the tower and the end of the call around this one may have the model read other images.
            is_inner = self._watched.is_running
            with self._encoder.aside() if is_inner and self._encoder is not None else nullcontext():
                self._watched.begin()
                try:
                    output = get_image_features(*args, **(kwargs | {"return_dict": True} if is_tuple else kwargs))
                finally:
                    self._watched.end()
                see(output, signature.bind_partial(*args, **kwargs).arguments)
            return output.to_tuple() if is_tuple else output

        apart = torch.compiler.disable(watched, recursive=False)  # type: ignore[no-untyped-call]
        yield InstanceMethod(self._base, "get_image_features", apart)

    def images_of(self, output: Any) -> list[Tensor]:
        """Features of each image on its own, from what `get_image_features` gives."""
        pooled = getattr(output, "pooler_output", output)
        # Llama 4 projects them later, token by token.
        pooled = output.last_hidden_state if pooled is None else pooled
        pieces = self._family.pieces
        if pieces is None:
            return list(pooled)
        most = pieces(self._base)
        return [one for features in pooled if len(features) for one in features.split(most)]
