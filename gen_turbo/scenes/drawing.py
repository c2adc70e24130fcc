"""Images of which a caption is true."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from gen_turbo.scenes.grammar import Pair, Scene, parse
from gen_turbo.scenes.palette import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SIZE_PX, SIZES, XX, YY, Array

_PAIR_RADIUS_PX = (14.0, 20.0)
_PAIR_DISTANCE_PX = 27
_DOT_RADIUS_PX = 2.3
_DOT_CLEARANCE_PX = 6


@dataclass(frozen=True)
class Drawing:
    """An image and where its things are.

    Attributes:
        image: 128 x 128, RGB.
        objects: Coverage of each object in [0, 1], (128, 128), in the order of the caption.
        dot: Coverage of the dot, or None without one.
    """

    image: Image.Image
    objects: list[Array]
    dot: Array | None


def render(caption: str, seed: int, dot: str | None = None) -> Image.Image:
    """Draws a 128 x 128 RGB image of which the caption is true; another seed lights and places it anew.

    Args:
        caption: A sentence of the grammar.
        seed: Decides lighting, stripes, exact places and sizes.
        dot: The colour of a dot of 4 to 5 pixels that is put somewhere on the background; captions do not mention it.

    Raises:
        ValueError: If the caption is not of the grammar or there is no such colour.
    """
    return draw(caption, seed, dot).image


def draw(caption: str, seed: int, dot: str | None = None) -> Drawing:
    """Draws as `render` does and says which pixels each thing covers."""
    scene = parse(caption)
    if dot is not None and dot not in COLORS:
        raise ValueError(f"the dot must have one of the colours {', '.join(COLORS)}; got {dot!r}")
    rng = random.Random(seed)
    if isinstance(scene, Scene):
        objects = [_placed(scene, rng)]
    else:
        objects = _placed_pair(scene, rng)
    light = _wave(rng.uniform(0, 2 * np.pi))[..., None]
    pixels = np.array(BACKGROUNDS[scene.background], np.float32) + 14 * light
    colors = [scene.color] if isinstance(scene, Scene) else [scene.color, scene.other_color]
    for mask, color in zip(objects, colors, strict=True):
        pixels = pixels * (1 - mask[..., None]) + _painted(color, light, rng) * mask[..., None]
    covered = None
    if dot is not None:
        covered = _dot_mask(objects, random.Random(f"dot {seed}"))
        pixels = pixels * (1 - covered[..., None]) + np.array(COLORS[dot], np.float32) * covered[..., None]
    return Drawing(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), objects, covered)


def _placed(scene: Scene, rng: random.Random) -> Array:
    x, y = POSITIONS[scene.position or rng.choice(list(POSITIONS))]
    radius = rng.uniform(*SIZES[scene.size])
    return shape_mask(scene.shape, x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), radius)


def _placed_pair(scene: Pair, rng: random.Random) -> list[Array]:
    """Two objects that never touch: apart along the relation, nearly level across it."""
    dx, dy = RELATIONS[scene.relation]
    shift = rng.uniform(-12, 12)
    masks = []
    for shape, side in ((scene.shape, _PAIR_DISTANCE_PX), (scene.other_shape, -_PAIR_DISTANCE_PX)):
        along, across = side + rng.uniform(-5, 5), shift + rng.uniform(-5, 5)
        x, y = SIZE_PX / 2 + dx * along + abs(dy) * across, SIZE_PX / 2 + dy * along + abs(dx) * across
        masks.append(shape_mask(shape, x, y, rng.uniform(*_PAIR_RADIUS_PX)))
    return masks


def _painted(color: str, light: Array, rng: random.Random) -> Array:
    """The lit and sometimes striped colour of an object, (128, 128, 3)."""
    painted: Array = np.array(COLORS[color], np.float32) * (1 + 0.13 * light)
    if rng.random() < 0.5:
        period, angle = rng.uniform(0.25, 0.5), rng.uniform(0, np.pi)
        stripes = np.sign(np.sin(_wave(angle) / period * 2 * np.pi))[..., None]
        painted = painted * (1 + 0.10 * stripes)
    return painted


def _dot_mask(objects: list[Array], rng: random.Random) -> Array:
    """A dot on the background, clear of the objects and of the image's edge."""
    grown = np.asarray(Image.fromarray((np.max(objects, 0) > 0).astype(np.uint8) * 255).resize((64, 64)))
    is_taken = grown > 0
    for _ in range(_DOT_CLEARANCE_PX // 2):
        padded = np.pad(is_taken, 1)
        is_taken = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:] | is_taken
    margin = np.ones_like(is_taken)
    margin[5:-5, 5:-5] = False
    ys, xs = np.nonzero(~(is_taken | margin))
    place = rng.randrange(len(ys))
    return shape_mask("circle", 2 * int(xs[place]) + rng.random(), 2 * int(ys[place]) + rng.random(), _DOT_RADIUS_PX)


def _wave(angle: float) -> Array:
    """A plane in [-sqrt 2, sqrt 2] that rises along `angle`, (128, 128)."""
    wave: Array = np.cos(angle) * XX + np.sin(angle) * YY
    return wave


def shape_mask(shape: str, x: float, y: float, radius: float, supersample: int = 3) -> Array:
    """Coverage in [0, 1] of one shape, (128, 128)."""
    canvas = Image.new("L", (SIZE_PX * supersample,) * 2, 0)
    draw = ImageDraw.Draw(canvas)
    x, y, radius = x * supersample, y * supersample, radius * supersample
    if shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    elif shape == "square":
        draw.rectangle([x - radius, y - radius, x + radius, y + radius], fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=255)
    else:
        arm = radius / 3
        draw.rectangle([x - radius, y - arm, x + radius, y + arm], fill=255)
        draw.rectangle([x - arm, y - radius, x + arm, y + radius], fill=255)
    coverage: Array = np.asarray(canvas.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX), np.float32) / 255
    return coverage
