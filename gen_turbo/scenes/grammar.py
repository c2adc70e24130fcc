"""Captions of one object or of two, read, written and drawn by lot."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import permutations

from gen_turbo.scenes.palette import BACKGROUNDS, COLORS, OPPOSITE, POSITIONS, RELATIONS, SHAPES, SIZES


@dataclass(frozen=True)
class Scene:
    """What a caption of one object claims; an empty `position` claims none."""

    size: str
    color: str
    shape: str
    position: str
    background: str

    @property
    def caption(self) -> str:
        """The sentence that `parse` reads back."""
        place = f"the {self.position} of " if self.position else ""
        return f"a {self.size} {self.color} {self.shape} on {place}a {self.background} background"


@dataclass(frozen=True)
class Pair:
    """What a caption of two objects claims: each one's colour and shape, and where the first lies from the second."""

    color: str
    shape: str
    relation: str
    other_color: str
    other_shape: str
    background: str

    @property
    def caption(self) -> str:
        """The sentence that `parse` reads back."""
        relation = self.relation if self.relation in ("above", "below") else f"{self.relation} of"
        first, second = f"{self.color} {self.shape}", f"{self.other_color} {self.other_shape}"
        return f"a {first} {relation} a {second} on a {self.background} background"

    @property
    def mirrored(self) -> Pair:
        """The same image with the other object named first."""
        other = OPPOSITE[self.relation]
        return Pair(self.other_color, self.other_shape, other, self.color, self.shape, self.background)

    @property
    def canonical(self) -> Pair:
        """This scene or its mirror, whichever names the left or upper object first."""
        return self if self.relation in ("left", "above") else self.mirrored


def parse(caption: str) -> Scene | Pair:
    """Reads a caption of this module's grammar.

    Raises:
        ValueError: If the sentence is not of the grammar; the message shows sentences that are.
    """
    words = caption.lower().rstrip(" .").split()
    scene: Scene | Pair | None = None
    if len(words) == 8 or (len(words) == 11 and words[4:6] == ["on", "the"]):
        position = words[6] if len(words) == 11 else ""
        scene = Scene(words[1], words[2], words[3], position, words[-2])
    elif len(words) in (11, 12):
        scene = Pair(words[1], words[2], words[3], words[-6], words[-5], words[-2])
    if scene is None or not _is_known(scene) or scene.caption.split() != words:
        raise ValueError(
            f"not a scene caption: {caption!r}; write for example 'a large red circle on the left of a gray background'"
            " or 'a red circle above a blue square on a white background'"
        )
    return scene


def _is_known(scene: Scene | Pair) -> bool:
    known = scene.color in COLORS and scene.shape in SHAPES and scene.background in BACKGROUNDS
    if isinstance(scene, Scene):
        return known and scene.size in SIZES and scene.position in ("", *POSITIONS)
    is_other = scene.other_color in COLORS and scene.other_shape in SHAPES
    differs = scene.color != scene.other_color and scene.shape != scene.other_shape
    return known and is_other and differs and scene.relation in RELATIONS


def all_scenes() -> list[Scene]:
    """Every scene of one object with a position, in a fixed order (720 of them)."""
    return [
        Scene(size, color, shape, position, background)
        for size in SIZES
        for color in COLORS
        for shape in SHAPES
        for position in POSITIONS
        for background in BACKGROUNDS
    ]


def all_pairs() -> list[Pair]:
    """Every scene of two objects of different colour and shape, in a fixed order (4,320 of them)."""
    return [
        Pair(color, shape, relation, other_color, other_shape, background)
        for color, other_color in permutations(COLORS, 2)
        for shape, other_shape in permutations(SHAPES, 2)
        for relation in RELATIONS
        for background in BACKGROUNDS
    ]


def is_held_out(scene: Scene | Pair) -> bool:
    """Whether the embedded models never saw this combination in training (about one in five)."""
    if isinstance(scene, Scene):
        named = scene.caption if scene.position else ""
    else:
        named = scene.canonical.caption
    return bool(named) and hashlib.sha256(named.encode()).digest()[0] % 5 == 0


def captions(n: int, seed: int, num_objects: int = 1) -> list[str]:
    """Draws `n` held-out captions of one object or of two; none repeats before all were drawn once.

    Raises:
        ValueError: If `n` is negative or `num_objects` is neither 1 nor 2.
    """
    if n < 0:
        raise ValueError(f"the number of captions must not be negative, got {n}")
    if num_objects not in (1, 2):
        raise ValueError(f"a scene has 1 or 2 objects, got num_objects={num_objects}")
    scenes: list[Scene] | list[Pair] = all_scenes() if num_objects == 1 else all_pairs()
    pool = [scene.caption for scene in scenes if is_held_out(scene)]
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < n:
        drawn.extend(rng.sample(pool, len(pool)))
    return drawn[:n]
