"""Questions whose answers follow from a caption."""

from __future__ import annotations

import random
from typing import NamedTuple

from gen_turbo.scenes.grammar import Pair, Scene, parse
from gen_turbo.scenes.palette import BACKGROUNDS, COLORS, OPPOSITE, POSITIONS, RELATIONS, SHAPES, SIZES

KINDS = ("color", "shape", "count", "size", "position", "relation", "detail")
"""What questions ask about; a scene of one object has a size and a position, one of two a relation."""

_PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
_ASKED = "what color shape is the object dot background how many objects are there where big relative to"
_ANSWERS = (*COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *POSITIONS, *RELATIONS, "none", "one", "two")
QUESTION_WORDS = tuple(sorted({*_ASKED.split(), *_PLURAL.values(), *_ANSWERS}))
"""Every word that a question or its answer may contain."""


class Question(NamedTuple):
    """A question, its answer of one word, and its subject."""

    question: str
    answer: str
    kind: str


def questions(caption: str, seed: int, dot: str | None = None) -> list[Question]:
    """Makes every question that a caption answers, in random order.

    Args:
        caption: A sentence of the grammar.
        seed: Decides the order, and which shape is counted.
        dot: The colour of the dot that `render` draws; then the one question of fine detail is about it.

    Raises:
        ValueError: If the caption is not of the grammar.
    """
    rng = random.Random(f"questions {seed}")
    scene = parse(caption)
    asked = _about_scene(scene) if isinstance(scene, Scene) else _about_pair(scene)
    asked.append(Question("what color is the background", scene.background, "color"))
    present = [scene.shape] if isinstance(scene, Scene) else [scene.shape, scene.other_shape]
    asked.append(Question("how many objects are there", "one" if len(present) == 1 else "two", "count"))
    absent = [shape for shape in SHAPES if shape not in present]
    asked.append(_about_number(rng.choice([rng.choice(present), rng.choice(absent)]), present))
    if dot is not None:
        asked.append(Question("what color is the dot", dot, "detail"))
    rng.shuffle(asked)
    return asked


def counts(caption: str) -> list[Question]:
    """Makes the question how many there are, of each shape.

    Raises:
        ValueError: If the caption is not of the grammar.
    """
    scene = parse(caption)
    present = [scene.shape] if isinstance(scene, Scene) else [scene.shape, scene.other_shape]
    return [_about_number(shape, present) for shape in SHAPES]


def _about_number(shape: str, present: list[str]) -> Question:
    return Question(f"how many {_PLURAL[shape]} are there", "one" if shape in present else "none", "count")


def _about_object(color: str, shape: str) -> list[Question]:
    return [
        Question(f"what color is the {shape}", color, "color"),
        Question(f"what shape is the {color} object", shape, "shape"),
    ]


def _about_scene(scene: Scene) -> list[Question]:
    asked = _about_object(scene.color, scene.shape)
    asked.append(Question(f"how big is the {scene.shape}", scene.size, "size"))
    if scene.position:
        asked.append(Question(f"where is the {scene.shape}", scene.position, "position"))
    return asked


def _about_pair(scene: Pair) -> list[Question]:
    asked = [*_about_object(scene.color, scene.shape), *_about_object(scene.other_color, scene.other_shape)]
    first, second = scene.shape, scene.other_shape
    asked.append(Question(f"where is the {first} relative to the {second}", scene.relation, "relation"))
    other = OPPOSITE[scene.relation]
    asked.append(Question(f"where is the {second} relative to the {first}", other, "relation"))
    return asked
