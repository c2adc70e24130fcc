"""What stands beside a denoiser's target: text and images that condition it, and how they can be shortened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gen_turbo.method import Grid


class Region(NamedTuple):
    """Tokens that follow each other and belong to one image or video.

    Attributes:
        num_frames: Frames of a video, each a grid; 1 for an image.
        grid: (height, width) of a frame in tokens.
    """

    num_frames: int
    grid: Grid

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.num_frames * self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TextSignature:
    """Where a model is given the text that shares attention with the image.

    Attributes:
        embedding: The argument that holds it, (B, T, C).
        positions: An argument of its positions, (T, d), of which rows are taken; empty where it has none.
        mask: An argument with a value per text token, (B, T), or per text token and then others; empty for none.
        hides: Whether the model never reads a token whose mask is zero.
        num_before: Tokens that the model puts before the text.
    """

    embedding: str = "encoder_hidden_states"
    positions: str = ""
    mask: str = ""
    hides: bool = False
    num_before: int = 0


@dataclass(frozen=True)
class MaskedText:
    """Text and other conditions of which no layer reads what a mask hides: they cannot be merged, but cut.

    Attributes:
        masks: For each argument of such tokens, (B, T, C), the one of their mask, (B, T); empty where the model hides
            all of them if all are zero, and else none.
        why: Why they cannot be merged.
    """

    masks: Mapping[str, str]
    why: str


class PrefixPart(NamedTuple):
    """Tokens of a prefix that are merged with each other alone.

    Attributes:
        places: Where they are in the prefix, (n,).
        tokens: What they are matched by, (B, n, C).
        region: Their frames and grid; None for text.
    """

    places: Tensor
    tokens: Tensor
    region: Region | None = None


@dataclass(frozen=True)
class Prefix:
    """Tokens before the target of which a model has keys and values from an earlier call, P of them.

    Attributes:
        parts: All of them, the text and each reference.
        layers: Keys and values of each layer, (B, P, heads, channels of a head).
        shown: Which of them attention may read, (B, P).
        arguments: From keys and values of each layer to what the model is given for its own.
    """

    parts: tuple[PrefixPart, ...]
    layers: list[tuple[Tensor, Tensor]]
    shown: Tensor
    arguments: Callable[[list[tuple[Tensor, Tensor]]], dict[str, Any]]


@dataclass(frozen=True)
class CachedPrefix:
    """Text and references before the target that no layer runs on again, for the model keeps their keys and values.

    Attributes:
        source: A tensor of what a call is given of them, which is another one once they are; None where the call
            makes them.
        read: From the arguments of such a call to the prefix.
    """

    source: Callable[[Mapping[str, Any]], Tensor | None]
    read: Callable[[Mapping[str, Any]], Prefix]


Text = TextSignature | MaskedText | CachedPrefix | str
"""Where a model is given text that can be merged or cut, or why there is none."""
