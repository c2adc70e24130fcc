"""Stable Diffusion with Turbo inside, as a community pipeline of diffusers takes it.

DiffusionPipeline.from_pretrained(CHECKPOINT, custom_pipeline="pipelines/turbo_stable_diffusion.py")
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from gen_turbo import TurboProcessor, attach


class TurboStableDiffusionPipeline(StableDiffusionPipeline):  # type: ignore[misc]
    """A Stable Diffusion pipeline whose calls run on fewer tokens; between calls its models are stock."""

    @torch.no_grad()
    def __call__(self, *args: Any, ratio: float = 0.4, processor: Any = None, **kwargs: Any) -> Any:
        """Generates images.

        Args:
            *args: As for `StableDiffusionPipeline`.
            ratio: Fraction of the tokens of the finest layers that is removed.
            processor: A gen_turbo processor instead of `TurboProcessor(ratio)`.
            **kwargs: As for `StableDiffusionPipeline`.

        Raises:
            ValueError: If a processor is attached already, or would reduce nothing.
        """
        with attach(self, processor or TurboProcessor(ratio)):
            return super().__call__(*args, **kwargs)
