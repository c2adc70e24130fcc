"""Reads the claims of a caption back from an image."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from PIL import Image

from gen_turbo.scenes.drawing import shape_mask
from gen_turbo.scenes.grammar import Pair, Scene, parse
from gen_turbo.scenes.palette import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, SIZE_PX, XX, YY, Array

_MIN_IOU = 0.72
_MAX_OFFSET_PX = 13.0
_SMALL_BELOW_PX = 23.0
_FOREGROUND_DISTANCE = 55.0
_MIN_FOREGROUND_PX = 80

Mask = npt.NDArray[np.bool_]


class _Claims:
    """One boolean per claim of a caption."""

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(getattr(self, claim.name) for claim in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class CheckResult(_Claims):
    """One boolean per claim of a caption of one object; `position` is true when the caption claims none."""

    size: bool
    color: bool
    shape: bool
    position: bool
    background: bool


@dataclass(frozen=True)
class PairCheckResult(_Claims):
    """One boolean per claim of a caption of two objects; `count` says whether there are two, no more and no fewer."""

    count: bool
    color: bool
    shape: bool
    other_color: bool
    other_shape: bool
    relation: bool
    background: bool


def check(image: Image.Image, caption: str) -> CheckResult | PairCheckResult:
    """Says which claims of the caption hold for the image.

    An image of another size is resized to 128 x 128 first. Without a visible object only the background
    can be right. The two objects of a caption are taken for those of the image in the way that makes most claims
    true, so that a swap is a wrong relation, not four wrong objects. A dot drawn on a scene of one object changes
    its extent; check images without one.

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
    if isinstance(scene, Pair):
        return _check_pair(pixels, foreground, background, scene)
    return _check_scene(pixels, foreground, background, scene)


def _check_scene(pixels: Array, foreground: Mask, background: bool, scene: Scene) -> CheckResult:
    if foreground.sum() < _MIN_FOREGROUND_PX:
        return CheckResult(False, False, False, False, background)
    (x, y), half = _extent(foreground)
    offsets = {name: float(np.hypot(x - px, y - py)) for name, (px, py) in POSITIONS.items()}
    position = min(offsets, key=lambda name: offsets[name])
    is_placed = position == scene.position and offsets[position] < _MAX_OFFSET_PX
    return CheckResult(
        size=("small" if half < _SMALL_BELOW_PX else "large") == scene.size,
        color=_color(pixels, foreground) == scene.color,
        shape=_shape(foreground) == scene.shape,
        position=is_placed or not scene.position,
        background=background,
    )


def _check_pair(pixels: Array, foreground: Mask, background: bool, scene: Pair) -> PairCheckResult:
    found = [part for part in _components(foreground) if part.sum() >= _MIN_FOREGROUND_PX]
    count = len(found) == 2
    if len(found) < 2:
        return PairCheckResult(count, False, False, False, False, False, background)
    read = [(_color(pixels, part), _shape(part), _extent(part)[0]) for part in found[:2]]
    results = []
    for one, other in (read, read[::-1]):
        dx, dy = RELATIONS[scene.relation]
        x, y = one[2][0] - other[2][0], one[2][1] - other[2][1]
        result = PairCheckResult(
            count=count,
            color=one[0] == scene.color,
            shape=one[1] == scene.shape,
            other_color=other[0] == scene.other_color,
            other_shape=other[1] == scene.other_shape,
            relation=x * dx + y * dy > abs(x * dy + y * dx),
            background=background,
        )
        results.append(result)
    return max(results, key=lambda result: sum(getattr(result, claim.name) for claim in fields(result)))


def _components(mask: Mask) -> list[Mask]:
    """Connected parts, the largest first: runs of pixels in a row, joined with those they touch in the row before."""
    change = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8))
    rows, begins = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]
    part = np.arange(len(rows))
    overlaps = (begins[:, None] < ends) & (begins < ends[:, None])
    for run, above in np.argwhere(overlaps & (rows[:, None] == rows + 1)):
        part[part == part[run]] = part[above]
    labels = np.full(mask.shape, -1)
    labels[mask] = np.repeat(part, ends - begins)
    numbers, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == number for number in numbers[np.argsort(-sizes, kind="stable")]]


def _foreground(pixels: Array, border: Mask) -> Mask:
    """Pixels far from the plane of light that fits the image's border."""
    plane = np.stack([np.ones_like(XX), XX, YY], -1)
    coefficients = np.linalg.lstsq(plane[border], pixels[border], rcond=None)[0]
    distance = np.linalg.norm(pixels - plane @ coefficients, axis=-1)
    return np.asarray(distance > _FOREGROUND_DISTANCE)


def _extent(foreground: Mask) -> tuple[tuple[float, float], float]:
    """Centre (x, y) and half the longer side of the foreground, without its outermost half per cent."""
    ys, xs = np.nonzero(foreground)
    y0, y1 = np.percentile(ys, [0.5, 99.5])
    x0, x1 = np.percentile(xs, [0.5, 99.5])
    return (float(x0 + x1) / 2, float(y0 + y1) / 2), max(x1 - x0, y1 - y0) / 2 + 0.5


def _shape(foreground: Mask) -> str:
    """The shape that covers the foreground best; none if none does well."""
    (x, y), half = _extent(foreground)
    overlaps = {shape: _iou(foreground, shape_mask(shape, x, y, half) > 0.5) for shape in SHAPES}
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= _MIN_IOU else ""


def _iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _color(pixels: Array, foreground: Mask) -> str:
    """The colour whose hue is nearest to the foreground's median."""
    median = np.median(pixels[foreground], 0)
    direction = median / max(1e-6, float(np.linalg.norm(median)))
    return max(COLORS, key=lambda name: float(direction @ np.array(COLORS[name])) / float(np.linalg.norm(COLORS[name])))


def _nearest(pixel: Array, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(pixel - np.array(palette[name]))))
