"""What the embedded vision-language model is asked about held-out scenes."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from gen_turbo import scenes
from gen_turbo.api import attach
from gen_turbo.bench.settings import Method
from gen_turbo.factory import build_processor
from gen_turbo.vlm.settings import Placed


class Ask(NamedTuple):
    """An image, what is asked of it, the one right answer and the kind of the question."""

    image: Image.Image
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class InTower(Method):
    """A method that plans any tokens, in the vision tower."""

    place: str = "tower"

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Attaches the method's processor at its place."""
        processor: Any = build_processor({"method": self.method, **self.options})
        return attach(target, Placed(processor, place=self.place))


@dataclass(frozen=True)
class Selecting(Method):
    """A method whose slots keep their anchor alone, so that a random one drops tokens and mixes none."""

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Attaches the method's processor at the gate."""
        processor: Any = build_processor({"method": self.method, **self.options})
        return attach(target, Placed(processor, combine="prune"))


def asked(count: int, seed: int, prompt: str = "describe the picture") -> list[Ask]:
    """One question of each kind about every held-out image, half of them with one object, half with two.

    Every image has a dot, so each is asked for its caption, for five or six plain things and for a fine detail.

    Args:
        count: Images.
        seed: Of the scenes, their rendering and the choice of questions.
        prompt: The request for a caption.

    Raises:
        ValueError: If `count` is negative.
    """
    rng = random.Random(seed)
    single, pairs = (scenes.captions(count, seed, number) for number in (1, 2))
    asks = []
    for number in range(count):
        caption, look, dot = (single, pairs)[number % 2][number], rng.randrange(2**31), rng.choice(list(scenes.COLORS))
        image, scene = scenes.render(caption, look, dot), scenes.parse(caption)
        told = scene.canonical.caption if isinstance(scene, scenes.Pair) else caption
        asks.append(Ask(image, prompt, told, "caption"))
        by_kind = {question.kind: question for question in scenes.questions(caption, look, dot)}
        asks += [Ask(image, *by_kind[kind]) for kind in scenes.KINDS if kind in by_kind]
    return asks
