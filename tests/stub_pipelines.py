"""Pipelines without a model, so that only files and loops are tested."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from PIL import Image


def image(number: int) -> Image.Image:
    """An image that differs from that of every other number."""
    return Image.new("RGB", (9, 9), (number % 256, number // 256 % 256, 7))


class CaptionStub:
    """Says the colour of each image.

    Args:
        check: Is called with the images of each batch before anything is said; it may raise.
    """

    def __init__(self, check: Callable[[list[Image.Image]], Any] = lambda images: None) -> None:
        self.check = check

    def __call__(self, images: list[Image.Image]) -> Any:
        self.check(images)
        return SimpleNamespace(
            texts=[str(one.getpixel((0, 0))) for one in images], seconds=1.0, num_tokens=4, num_kept=2
        )


class GenerateStub:
    """Draws each image anew, twice as large, in a shade that is its seed.

    Args:
        check: As of `CaptionStub`.
    """

    generate = SimpleNamespace(set_progress_bar_config=lambda **settings: None)

    def __init__(self, check: Callable[[list[Image.Image]], Any] = lambda images: None) -> None:
        self.check = check

    def __call__(self, images: list[Image.Image], seeds: int) -> Any:
        self.check(images)
        said = [str(one.getpixel((0, 0))) for one in images]
        drawn = [
            Image.new("RGB", (one.width * 2, one.height * 2), (*one.getpixel((0, 0))[:2], seeds)) for one in images
        ]
        figures = {"caption_seconds": 1.0, "generate_seconds": 1.0, "num_tokens": 4, "num_kept": 2}
        return SimpleNamespace(captions=said, prompts=said, images=drawn, drawn_tokens=4, drawn_kept=2, **figures)
