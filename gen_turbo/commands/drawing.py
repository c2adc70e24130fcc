"""What a calibration draws with a diffusion pipeline, and how near that is to stock."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gen_turbo import scenes
from gen_turbo.config import CALL_SETTINGS, ConfigError, PipelineConfig
from gen_turbo.schemas import check_count

_PROMPTS = (
    "a photo of a street market with many people",
    "a portrait of an old woman, soft light",
    "a mountain lake at sunrise, wide angle",
    "a red bicycle leaning on a white wall",
)
OWN_SEED = 1000
"""Keeps captions and noise apart from those of the benchmarks, whose seeds begin at 0."""
_MOST_DB = 100.0
Draw = Callable[..., Any]
"""Makes the i-th image in a form of the pipeline's output, always from the same noise."""


def pixels(draw: Draw, index: int) -> Any:
    """The i-th image, or the frames of the i-th video, as numbers from 0 to 1."""
    from gen_turbo.training.calibrate_denoiser import content

    return np.asarray(content(draw(index, "np")))[0]


def distance_db(stock: Any, own: Any) -> float:
    """PSNR in dB, of all frames together."""
    error = float(np.square(stock.astype(np.float64) - own).mean())
    return min(_MOST_DB, -10 * math.log10(max(error, 1e-12)))


def drawer(pipe: Any, config: PipelineConfig, prompts: list[str], seed: int) -> Callable[[int, str], Any]:
    """A function that makes the i-th image, always from the same noise."""
    given = {call: getattr(config, name) for name, call in CALL_SETTINGS.items() if getattr(config, name) is not None}

    def draw(index: int, output_type: str, **changed: Any) -> Any:
        generator = torch.Generator().manual_seed(seed + index)
        return pipe(prompt=prompts[index], generator=generator, output_type=output_type, **given | changed)

    return draw


def drawn(draw: Draw, index: int) -> tuple[Any, float]:
    """The pixels of an image or a video and the seconds that it took."""
    from gen_turbo.training.stopwatch import seconds_now

    start = seconds_now()
    image = pixels(draw, index)
    return image, seconds_now() - start


def prompts_of(namespace: argparse.Namespace, config: PipelineConfig) -> list[str]:
    """As many prompts as were asked for: those given, scenes for the embedded models, or some of our own."""
    check_count("--prompts", namespace.prompts)
    if namespace.prompt:
        known: list[str] = namespace.prompt
    elif config.checkpoint.startswith("embedded:"):
        known = list(scenes.captions(namespace.prompts, namespace.seed + OWN_SEED))
    else:
        known = list(_PROMPTS)
    if namespace.prompts > len(known):
        raise ConfigError(f"--prompts must be at most {len(known)}, or give more --prompt; got {namespace.prompts}")
    return known[: namespace.prompts]


def note(text: str) -> None:
    """Prints a line of progress."""
    print(text, flush=True)
