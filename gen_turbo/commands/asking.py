"""Prompts that learned parts are trained on: any images with any questions, or rendered scenes with theirs.

Scenes held out for evaluation are never among them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gen_turbo import scenes
from gen_turbo.commands.failures import shown
from gen_turbo.config import ConfigError
from gen_turbo.inputs import find_images, open_image

Batches = Callable[[int], Mapping[str, Tensor]]
"""Gives the inputs of a batch by its number; the same number gives the same batch."""
_MOST_DRAWS = 1000


def scene_prompts(pipe: Any, batch: int, seed: int) -> Batches:
    """Rendered scenes of one and of two objects, each with a dot; one prompt in three requests a caption.

    Args:
        pipe: A captioning pipeline, which prepares them.
        batch: Prompts of a batch.
        seed: Of the scenes and of what is asked.
    """
    pools = [[one.caption for one in pool if not scenes.is_held_out(one)] for pool in _all_scenes()]

    def give(number: int) -> Mapping[str, Tensor]:
        rng = random.Random(f"asking {seed} {number}")
        images, texts = [], []
        for _ in range(batch):
            caption, look, dot = rng.choice(rng.choice(pools)), rng.randrange(2**31), rng.choice(list(scenes.COLORS))
            images.append(scenes.render(caption, look, dot))
            asked = rng.choice(scenes.questions(caption, look, dot)).question
            texts.append(pipe.config.prompt if rng.random() < 1 / 3 else asked)
        return prepared(pipe, images, texts)

    return give


def image_prompts(pipe: Any, sources: Sequence[str | Path], prompts: Sequence[str], batch: int, seed: int) -> Batches:
    """Random images of one's own with random prompts.

    Args:
        pipe: A captioning pipeline, which prepares them.
        sources: Files, folders or patterns.
        prompts: What may be asked; the pipeline's own prompt where there is none.
        batch: Prompts of a batch.
        seed: Of both draws.

    Raises:
        ConfigError: If a source stands for nothing.
    """
    draw = any_image(find_images(sources))
    asked = list(prompts) or [pipe.config.prompt]

    def give(number: int) -> Mapping[str, Tensor]:
        rng = random.Random(f"asking {seed} {number}")
        chosen = [draw(rng) for _ in range(batch)]
        return prepared(pipe, chosen, [rng.choice(asked) for _ in chosen])

    return give


def any_image(files: Sequence[Path]) -> Callable[[random.Random], Image.Image]:
    """Draws images; one that cannot be read is reported once, and another always takes its place."""
    bad: set[Path] = set()

    def draw(rng: random.Random) -> Image.Image:
        for _ in range(_MOST_DRAWS):
            path = rng.choice(files)
            try:
                if path not in bad:
                    return open_image(path)
            except ConfigError as error:
                bad.add(path)
                print(f"gen-turbo: {shown(error)}; another takes its place", file=sys.stderr)
        raise ConfigError(f"of {len(files)} images hardly one can be read; the last was {path}")

    return draw


def prepared(pipe: Any, images: list[Image.Image], prompts: Sequence[str | None]) -> Mapping[str, Tensor]:
    """The model's inputs for images with a prompt each.

    Raises:
        ConfigError: If the model reads no text with an image.
    """
    texts = [pipe.text_of(prompt) for prompt in prompts]
    if any(text is None for text in texts):
        raise ConfigError("this model reads no prompt with an image; there is nothing to train on")
    inputs = pipe.preparer(images=images, text=texts, return_tensors="pt", padding=True).to(pipe.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(pipe.vlm.dtype)
    given: Mapping[str, Tensor] = inputs
    return given


def _all_scenes() -> tuple[list[Any], list[Any]]:
    return list(scenes.all_scenes()), list(scenes.all_pairs())
