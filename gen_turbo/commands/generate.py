"""Making images with a loaded pipeline, and the same images with and without a processor."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from gen_turbo.api import NoEffectWarning, attach
from gen_turbo.config import CALL_SETTINGS, PipelineConfig
from gen_turbo.engine.report import LayerReport, report
from gen_turbo.metrics.image import psnr
from gen_turbo.schemas import check_count, check_seed

_GAP_PX = 4
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Job:
    """One image to make: what it shows, and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Comparison:
    """One image made by the stock pipeline and with a processor, from the same noise.

    Attributes:
        job: What was made.
        stock: The image of the stock pipeline.
        image: The image with the processor.
        stock_s: Seconds that the stock pipeline took.
        image_s: Seconds with the processor.
        num_tokens: Tokens in the finest attention that is reduced.
        num_kept: Tokens that this attention runs on in a reduced step.
        flops_saved: Fraction of the attention operations of the reached layers that was not spent.
    """

    job: Job
    stock: Image.Image
    image: Image.Image
    stock_s: float
    image_s: float
    num_tokens: int
    num_kept: int
    flops_saved: float

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio to the stock image; infinite where both are equal."""
        return psnr(self.stock, self.image)

    def side_by_side(self) -> Image.Image:
        """The stock image on the left, the other on the right, a white gap of 4 pixels between them."""
        width, height = self.stock.size
        both = Image.new("RGB", (2 * width + _GAP_PX, height), "white")
        both.paste(self.stock, (0, 0))
        both.paste(self.image, (width + _GAP_PX, 0))
        return both

    def record(self) -> dict[str, Any]:
        """All figures as JSON takes them; `psnr_db` is null where both images are equal."""
        distance_db = self.psnr_db
        return {
            "prompt": self.job.prompt,
            "seed": self.job.seed,
            "stock_s": round(self.stock_s, 4),
            "image_s": round(self.image_s, 4),
            "speedup": round(self.stock_s / self.image_s, 3),
            "num_tokens": self.num_tokens,
            "num_kept": self.num_kept,
            "attention_flops_saved": round(self.flops_saved, 4),
            "psnr_db": None if math.isinf(distance_db) else round(distance_db, 2),
        }


def plan_jobs(prompts: Sequence[str], seed: int, num_images: int) -> list[Job]:
    """The images to make: `num_images` of each prompt, whose seeds count up from `seed`.

    Raises:
        ConfigError: If there would be none, or a seed is out of range.
    """
    check_count("the number of images", num_images)
    for last in (seed, seed + num_images - 1):
        check_seed(last)
    return [Job(prompt, seed + offset) for prompt in prompts for offset in range(num_images)]


def draw(pipe: Any, config: PipelineConfig, job: Job, label: str, steps: int | None = None) -> Image.Image:
    """Makes one image; the noise depends on the seed alone, not on the device.

    Args:
        pipe: A diffusers text-to-image pipeline.
        config: Steps, guidance and size are taken from it.
        job: What to make.
        label: What the progress bar shows.
        steps: Denoising steps, instead of the configuration's.
    """
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None)
    settings = {call: getattr(config, name) for name, call in CALL_SETTINGS.items()}
    if steps is not None:
        settings["num_inference_steps"] = steps
    given = {name: value for name, value in settings.items() if value is not None}
    generator = torch.Generator().manual_seed(job.seed)
    image: Image.Image = pipe(prompt=job.prompt, generator=generator, **given).images[0]
    return image


def warm_up(pipe: Any, config: PipelineConfig, processor: Any, job: Job) -> None:
    """Runs a few steps of both kinds, so that the first timed image pays for no start of a device or library."""
    steps = min(config.steps, _WARM_UP_STEPS)
    draw(pipe, config, job, "warm-up", steps)
    with attach(pipe, processor), warnings.catch_warnings():
        # So few steps gain nothing; of the image itself it is said where it is so.
        warnings.simplefilter("ignore", NoEffectWarning)
        draw(pipe, config, job, "warm-up", steps)


def compare(pipe: Any, config: PipelineConfig, processor: Any, job: Job, label: str) -> Comparison:
    """Makes one image with the stock pipeline and one with a processor, and times both calls whole.

    Args:
        pipe: A pipeline without a processor; afterwards it is without one again.
        config: Steps, guidance and size are taken from it.
        processor: What is attached for the second image.
        job: What to make.
        label: What the progress bar shows.
    """
    start_s = time.perf_counter()
    stock = draw(pipe, config, job, f"{label} stock")
    stock_s = time.perf_counter() - start_s
    with attach(pipe, processor):
        start_s = time.perf_counter()
        image = draw(pipe, config, job, f"{label} {type(processor).__name__}")
        image_s = time.perf_counter() - start_s
        result = report(pipe)
    layer = finest_layer(result.layers)
    return Comparison(job, stock, image, stock_s, image_s, layer.num_tokens, layer.num_kept, result.flops_saved)


def finest_layer(layers: Sequence[LayerReport]) -> LayerReport:
    """The reduced layer with the most tokens."""
    return max((layer for layer in layers if layer.status == "reduced"), key=lambda layer: layer.num_tokens)


def prompt_notes(pipe: Any, prompt: str) -> list[str]:
    """What the pipeline's tokenizer will not take of a prompt: words that it does not know, or the end of it."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return []
    notes = []
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown not in (None, tokenizer.eos_token_id, tokenizer.pad_token_id):
        words = [word for word in prompt.split() if unknown in tokenizer(word).input_ids]
        if words:
            notes.append(f"the model does not know {', '.join(map(repr, words))} in {prompt!r}")
    if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length:
        notes.append(f"the end of {prompt!r} is cut off; the model reads {tokenizer.model_max_length} tokens")
    return notes
