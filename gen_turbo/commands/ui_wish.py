"""What may be set on the page, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from gen_turbo.config import ConfigError
from gen_turbo.schemas import check_finite, check_kinds, check_seed

MOST_PROMPT, MOST_STEPS, MOST_PIXELS = 500, 100, 4096 * 4096
PRESETS: dict[str, dict[str, Any]] = {
    "close to stock": {"method": "turbo", "ratio": 0.4},
    "default": {"method": "turbo"},
    "whole blocks": {"method": "turbo", "ratio": 0.5, "scope": "block"},
    "fastest": {
        "method": "turbo",
        "ratio": 0.5,
        "scope": "block",
        "merge_span": 0,
        "restore": "copy",
        "match_every": 5,
    },
}
"""Settings by name; a ratio given beside replaces theirs."""


@dataclass(frozen=True)
class Wish:
    """What a user wants to see.

    Attributes:
        prompt: What the image shows.
        preset: One of PRESETS.
        ratio: Fraction of tokens to remove.
        steps: Denoising steps.
        seed: Of the noise.
        source: An image to start from, or None.
        strength: How far to go from it.
    """

    prompt: str
    preset: str
    ratio: float
    steps: int
    seed: int
    source: Image.Image | None = None
    strength: float = 0.6

    def __post_init__(self) -> None:
        """Checks everything that comes from the page; raises ConfigError."""
        check_kinds(self)
        check_finite(self)
        if not self.prompt.strip() or len(self.prompt) > MOST_PROMPT:
            raise ConfigError(f"a prompt must have 1 to {MOST_PROMPT} characters")
        settings_of(self.preset, self.ratio)
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(f"steps must be between 1 and {MOST_STEPS}; got {self.steps}")
        check_seed(self.seed)
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength must be a number in (0, 1]; got {self.strength}")
        check_image(self.source)


def settings_of(preset: str, ratio: float) -> dict[str, Any]:
    """The settings of a processor; raises ConfigError if there is no such preset."""
    if preset not in PRESETS:
        raise ConfigError(f"there is no setting {preset!r}; there are: {', '.join(PRESETS)}")
    return {**PRESETS[preset], "ratio": ratio}


def check_image(image: Image.Image | None) -> None:
    """Refuses an image of too many pixels; raises ConfigError."""
    if image is not None and image.width * image.height > MOST_PIXELS:
        raise ConfigError(f"an image may have at most {MOST_PIXELS} pixels; got {image.width} x {image.height}")
