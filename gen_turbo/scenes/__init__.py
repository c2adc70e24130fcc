"""Captioned procedural scenes with an exact programmatic checker, and questions about them.

A scene is one lit, sometimes striped object on a lit background, or two in a relation. The caption of one object
names size, colour, shape, position and background; that of two names both colours and shapes, the relation and the
background. `check` reads them back from any 128 x 128 image. Unlimited, licence-free data on which "does the image
show what the caption says" has an exact answer.
"""

from gen_turbo.scenes.asking import KINDS, QUESTION_WORDS, Question, counts, questions
from gen_turbo.scenes.checking import CheckResult, PairCheckResult, check
from gen_turbo.scenes.drawing import Drawing, draw, render
from gen_turbo.scenes.grammar import Pair, Scene, all_pairs, all_scenes, captions, is_held_out, parse
from gen_turbo.scenes.palette import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, SIZE_PX, SIZES, WORDS

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "KINDS",
    "POSITIONS",
    "QUESTION_WORDS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SIZE_PX",
    "WORDS",
    "CheckResult",
    "Drawing",
    "Pair",
    "PairCheckResult",
    "Question",
    "Scene",
    "all_pairs",
    "all_scenes",
    "captions",
    "check",
    "counts",
    "draw",
    "is_held_out",
    "parse",
    "questions",
    "render",
]
