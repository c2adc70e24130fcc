"""Image to caption to new image, in batches, both halves with a processor of their own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
from PIL import Image

from gen_turbo.api import attachments
from gen_turbo.config import CALL_SETTINGS, HALVES, CaptionGenerateConfig, ConfigError
from gen_turbo.engine.report import report
from gen_turbo.inputs import images_of
from gen_turbo.method import TokenReducer
from gen_turbo.registry import PIPELINES
from gen_turbo.schemas import check_seed, check_strength

from .caption import CaptionPipeline, positive
from .caption import caption as load_caption
from .text_to_image import text_to_image


@dataclass(frozen=True)
class CaptionGenerateResult:
    """New images and how they came to be; every list has one entry an image, in the order given.

    Attributes:
        captions: What was said about the old images.
        prompts: What was drawn.
        images: The new images.
        caption_seconds: Passed while the old images were read.
        generate_seconds: Passed while the new ones were drawn.
        num_tokens: Image tokens of all old images, as the stock model reads them.
        num_kept: Those of them that were kept.
        drawn_tokens: Tokens of the finest attention layer that is reduced while drawing; 0 without a processor.
        drawn_kept: Tokens that this layer runs on in a reduced step.
    """

    captions: list[str]
    prompts: list[str]
    images: list[Image.Image]
    caption_seconds: float
    generate_seconds: float
    num_tokens: int
    num_kept: int
    drawn_tokens: int
    drawn_kept: int

    @property
    def seconds(self) -> float:
        """Passed in both halves."""
        return self.caption_seconds + self.generate_seconds


class CaptionGeneratePipeline:
    """Two pipelines in a row.

    Attributes:
        caption: The half that reads images.
        generate: The half that draws: a stock diffusers pipeline, of another class once it is given a strength.
        config: The settings of both; strength, batch and what is drawn are defaults of the call.
    """

    def __init__(self, caption: CaptionPipeline, generate: Any, config: CaptionGenerateConfig) -> None:
        self.caption, self.generate, self.config = caption, generate, config

    def set_attn_processor(self, processor: TokenReducer | Mapping[str, TokenReducer | None] | None) -> None:
        """Attaches one processor to both halves, or to each its own from a mapping with `caption` and `generate`.

        A half whose processor is None becomes stock; one that a mapping does not name stays as it is.

        Raises:
            ValueError: If a processor would reduce nothing on its half, or a half is unknown.
        """
        given = processor if isinstance(processor, Mapping) else dict.fromkeys(HALVES, processor)
        unknown = sorted(set(given) - set(HALVES))
        if unknown:
            raise ConfigError(f"there is no half {', '.join(unknown)}; the halves are {' and '.join(HALVES)}")
        for half, own in given.items():
            getattr(self, half).set_attn_processor(own)

    def reset_attn_processor(self) -> None:
        """Takes gen_turbo off both halves."""
        self.set_attn_processor(None)

    def __call__(
        self,
        images: Any,
        prompt: str | None = None,
        strength: float | None = None,
        batch_size: int | None = None,
        seeds: int | Sequence[int] = 0,
        **call: Any,
    ) -> CaptionGenerateResult:
        """Reads every image and draws a new one.

        Args:
            images: An image, a path, a folder, a pattern, or a list of any of these.
            prompt: The prompt about the images; None takes the configuration's.
            strength: How far new images leave the old ones, in (0, 1]; None as configured.
            batch_size: Images that are drawn at once; None as configured.
            seeds: Of the noise: one of each image, or one for all.
            **call: Goes to the call of the half that draws, such as `num_inference_steps`.

        Raises:
            ConfigError: If an image cannot be read, or a setting does not fit.
        """
        check_strength(strength)
        sources = images_of(images)
        each = [seeds] * len(sources) if isinstance(seeds, int) else list(seeds)
        for seed in each:
            check_seed(seed)
        if len(each) != len(sources):
            raise ConfigError(f"{len(each)} seeds do not fit {len(sources)} images; give one each, or one for all")
        said = self.caption(sources, prompt)
        prompts = [self.config.drawn.replace("{caption}", text) for text in said.texts]
        start_s = time.perf_counter()
        batch = positive("batch_size", batch_size, self.config.batch_size)
        strength = self.config.strength if strength is None else strength
        drawn: list[Image.Image] = []
        for first in range(0, len(sources), batch):
            part = slice(first, first + batch)
            drawn += self._draw(prompts[part], sources[part], each[part], strength, call)
        seconds = time.perf_counter() - start_s
        return CaptionGenerateResult(
            said.texts, prompts, drawn, said.seconds, seconds, said.num_tokens, said.num_kept, *self._drawn_tokens()
        )

    def _draw(
        self,
        prompts: list[str],
        sources: list[Image.Image],
        seeds: list[int],
        strength: float | None,
        call: dict[str, Any],
    ) -> list[Image.Image]:
        config = self.config.generate
        given = {name: getattr(config, setting) for setting, name in CALL_SETTINGS.items()}
        self._prepare(takes_image=strength is not None)
        if strength is not None:
            side = _own_side(self.generate)
            size = (given.pop("width") or side, given.pop("height") or side)
            given["image"] = [one.resize(size, Image.Resampling.LANCZOS) for one in sources]
            given["strength"] = strength
        given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {name: value for name, value in given.items() if value is not None}
        drawn: list[Image.Image] = self.generate(prompt=prompts, **{**settings, **call}).images
        return drawn

    def _prepare(self, takes_image: bool) -> None:
        """Makes the half that draws one that takes an image, or none, from the same parts; processors stay."""
        before = self.generate
        if takes_image == ("strength" in inspect.signature(type(before).__call__).parameters):
            return
        kind = AutoPipelineForImage2Image if takes_image else AutoPipelineForText2Image
        try:
            after = kind.from_pipe(before)
        except ValueError as error:
            how = "from an image; set strength=null" if takes_image else "from text alone; give a strength"
            raise ConfigError(f"{type(before).__name__} has no form that draws {how}") from error
        after.set_progress_bar_config(**getattr(before, "_progress_bar_config", {}))
        attached = [part.reducer for part in attachments(before)]
        if attached:
            after.set_attn_processor(attached[0])
        self.generate = after

    def _drawn_tokens(self) -> tuple[int, int]:
        layers = [layer for layer in report(self.generate).layers if layer.status == "reduced" and layer.num_tokens]
        finest = max(layers, key=lambda layer: layer.num_tokens, default=None)
        return (finest.num_tokens, finest.num_kept) if finest is not None else (0, 0)


def _own_side(pipe: Any) -> int:
    """The side, in pixels, that a pipeline draws by itself."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    return int(model.config.sample_size * pipe.vae_scale_factor)


@PIPELINES.register("caption-generate")
def caption_generate(config: CaptionGenerateConfig) -> CaptionGeneratePipeline:
    """Loads both halves, each as its own builder does.

    Raises:
        ConfigError: If the device or a checkpoint is not there, cannot be read, or is of another kind.
    """
    return CaptionGeneratePipeline(load_caption(config.caption), text_to_image(config.generate), config)
