"""Captioned procedural scenes with an exact programmatic checker.

A scene is one lit, sometimes striped object on a lit background. Its caption names size, colour, shape,
position and background; `check` reads them back from any 128 x 128 picture. Unlimited, licence-free data on
which "does the picture show what the caption says" has an exact answer.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIZE_PX = 128
COLORS = {
    "red": (215, 45, 45),
    "green": (45, 165, 65),
    "blue": (45, 85, 215),
    "yellow": (240, 210, 50),
    "purple": (150, 55, 185),
    "orange": (245, 140, 30),
}
BACKGROUNDS = {"white": (238, 238, 238), "black": (28, 28, 28), "gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (15.0, 19.0), "large": (27.0, 31.0)}
"""Radius in pixels, as (least, greatest)."""
POSITIONS = {"left": (42, 64), "right": (86, 64), "top": (64, 42), "bottom": (64, 86), "center": (64, 64)}
"""Centre of the object as (x, y) in pixels; a render jitters it by up to 4 pixels."""
WORDS = tuple(sorted({"a", "on", "the", "of", "background", *COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *POSITIONS}))
"""Every word a caption may contain."""

_MIN_IOU = 0.72
_MAX_OFFSET_PX = 13.0
_SMALL_BELOW_PX = 23.0
_FOREGROUND_DISTANCE = 55.0
_MIN_FOREGROUND_PX = 80

Array = npt.NDArray[np.floating]
_YY, _XX = np.mgrid[0:SIZE_PX, 0:SIZE_PX].astype(np.float32) / (SIZE_PX / 2) - 1


@dataclass(frozen=True)
class Scene:
    """What a caption claims; an empty `position` claims none."""

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
class CheckResult:
    """One boolean per claim of the caption; `position` is true when the caption claims none."""

    size: bool
    color: bool
    shape: bool
    position: bool
    background: bool

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(getattr(self, claim.name) for claim in fields(self))


def parse(caption: str) -> Scene:
    """Reads a caption of this module's grammar.

    Raises:
        ValueError: If the sentence is not of the grammar; the message shows a sentence that is.
    """
    words = caption.lower().rstrip(" .").split()
    scene = None
    if len(words) in (8, 11):
        position = words[6] if len(words) == 11 else ""
        scene = Scene(words[1], words[2], words[3], position, words[-2])
    if scene is None or scene.caption.split() != words or not _is_known(scene):
        raise ValueError(
            f"not a scene caption: {caption!r}; write for example 'a large red circle on the left of a gray background'"
        )
    return scene


def _is_known(scene: Scene) -> bool:
    return (
        scene.size in SIZES
        and scene.color in COLORS
        and scene.shape in SHAPES
        and scene.position in ("", *POSITIONS)
        and scene.background in BACKGROUNDS
    )


def all_scenes() -> list[Scene]:
    """Every scene with a position, in a fixed order (720 of them)."""
    return [
        Scene(size, color, shape, position, background)
        for size in SIZES
        for color in COLORS
        for shape in SHAPES
        for position in POSITIONS
        for background in BACKGROUNDS
    ]


def is_held_out(scene: Scene) -> bool:
    """Whether the embedded models never saw this combination in training (about one in five)."""
    with_position = scene.caption if scene.position else ""
    return bool(with_position) and hashlib.sha256(with_position.encode()).digest()[0] % 5 == 0


def captions(n: int, seed: int) -> list[str]:
    """Draws `n` held-out captions; none repeats before all were drawn once.

    Raises:
        ValueError: If `n` is negative.
    """
    if n < 0:
        raise ValueError(f"the number of captions must not be negative, got {n}")
    pool = [scene.caption for scene in all_scenes() if is_held_out(scene)]
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < n:
        drawn.extend(rng.sample(pool, len(pool)))
    return drawn[:n]


def render(caption: str, seed: int) -> Image.Image:
    """Draws a 128 x 128 RGB picture of which the caption is true; another seed lights and places it anew."""
    scene = parse(caption)
    rng = random.Random(seed)
    x, y = POSITIONS[scene.position or rng.choice(list(POSITIONS))]
    radius = rng.uniform(*SIZES[scene.size])
    mask = _shape_mask(scene.shape, x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), radius)[..., None]
    light = _wave(rng.uniform(0, 2 * np.pi))[..., None]
    background = np.array(BACKGROUNDS[scene.background], np.float32) + 14 * light
    foreground = np.array(COLORS[scene.color], np.float32) * (1 + 0.13 * light)
    if rng.random() < 0.5:
        period, angle = rng.uniform(0.25, 0.5), rng.uniform(0, np.pi)
        stripes = np.sign(np.sin(_wave(angle) / period * 2 * np.pi))[..., None]
        foreground = foreground * (1 + 0.10 * stripes)
    pixels = np.clip(background * (1 - mask) + foreground * mask, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def check(image: Image.Image, caption: str) -> CheckResult:
    """Says which claims of the caption hold for the picture.

    A picture of another size is resized to 128 x 128 first. Without a visible object only the background
    can be right.

    Raises:
        ValueError: If the caption is not of the grammar.
    """
    scene = parse(caption)
    if image.size != (SIZE_PX, SIZE_PX):
        image = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    border = np.ones((SIZE_PX, SIZE_PX), bool)
    border[6:-6, 6:-6] = False
    background = _nearest(pixels[border].mean(0), BACKGROUNDS) == scene.background
    foreground = _foreground(pixels, border)
    if foreground.sum() < _MIN_FOREGROUND_PX:
        return CheckResult(False, False, False, False, background)
    (x, y), half = _extent(foreground)
    overlaps = {shape: _iou(foreground, _shape_mask(shape, x, y, half) > 0.5) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    offsets = {name: float(np.hypot(x - px, y - py)) for name, (px, py) in POSITIONS.items()}
    position = min(offsets, key=lambda name: offsets[name])
    is_placed = position == scene.position and offsets[position] < _MAX_OFFSET_PX
    return CheckResult(
        size=("small" if half < _SMALL_BELOW_PX else "large") == scene.size,
        color=_nearest_hue(np.median(pixels[foreground], 0)) == scene.color,
        shape=shape == scene.shape and overlaps[shape] >= _MIN_IOU,
        position=is_placed or not scene.position,
        background=background,
    )


def _wave(angle: float) -> Array:
    """A plane in [-sqrt 2, sqrt 2] that rises along `angle`, (128, 128)."""
    wave: Array = np.cos(angle) * _XX + np.sin(angle) * _YY
    return wave


def _shape_mask(shape: str, x: float, y: float, radius: float, supersample: int = 3) -> Array:
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


def _foreground(pixels: Array, border: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels far from the plane of light that fits the picture's border."""
    plane = np.stack([np.ones_like(_XX), _XX, _YY], -1)
    coefficients = np.linalg.lstsq(plane[border], pixels[border], rcond=None)[0]
    distance = np.linalg.norm(pixels - plane @ coefficients, axis=-1)
    return np.asarray(distance > _FOREGROUND_DISTANCE)


def _extent(foreground: npt.NDArray[np.bool_]) -> tuple[tuple[float, float], float]:
    """Centre (x, y) and half the longer side of the foreground, without its outermost half per cent."""
    ys, xs = np.nonzero(foreground)
    y0, y1 = np.percentile(ys, [0.5, 99.5])
    x0, x1 = np.percentile(xs, [0.5, 99.5])
    return (float(x0 + x1) / 2, float(y0 + y1) / 2), max(x1 - x0, y1 - y0) / 2 + 0.5


def _iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _nearest(pixel: Array, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(pixel - np.array(palette[name]))))


def _nearest_hue(pixel: Array) -> str:
    direction = pixel / max(1e-6, float(np.linalg.norm(pixel)))
    return max(COLORS, key=lambda name: float(direction @ np.array(COLORS[name])) / float(np.linalg.norm(COLORS[name])))
