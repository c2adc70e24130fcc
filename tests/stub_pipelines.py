"""Pipelines without a model, so that only files and loops are tested."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from PIL import Image


def picture(number: int) -> Image.Image:
    """A picture that differs from that of every other number."""
    return Image.new("RGB", (9, 9), (number % 256, number // 256 % 256, 7))


class CaptionStub:
    """Says the colour of each picture.

    Args:
        check: Is called with the pictures of each batch before anything is said; it may raise.
    """

    def __init__(self, check: Callable[[list[Image.Image]], Any] = lambda pictures: None) -> None:
        self.check = check

    def __call__(self, pictures: list[Image.Image]) -> Any:
        self.check(pictures)
        return SimpleNamespace(
            texts=[str(one.getpixel((0, 0))) for one in pictures], seconds=1.0, num_tokens=4, num_kept=2
        )


class GenerateStub:
    """Draws each picture anew, twice as large, in a shade that is its seed.

    Args:
        check: As of `CaptionStub`.
    """

    picture = SimpleNamespace(set_progress_bar_config=lambda **settings: None)

    def __init__(self, check: Callable[[list[Image.Image]], Any] = lambda pictures: None) -> None:
        self.check = check

    def __call__(self, pictures: list[Image.Image], seeds: int) -> Any:
        self.check(pictures)
        said = [str(one.getpixel((0, 0))) for one in pictures]
        images = [
            Image.new("RGB", (one.width * 2, one.height * 2), (*one.getpixel((0, 0))[:2], seeds)) for one in pictures
        ]
        figures = {"caption_seconds": 1.0, "picture_seconds": 1.0, "num_tokens": 4, "num_kept": 2}
        return SimpleNamespace(captions=said, prompts=said, images=images, drawn_tokens=4, drawn_kept=2, **figures)
