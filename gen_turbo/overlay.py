"""Images of what a method did to the tokens of an image: groups, arrows, kept tokens, heat, layers.

Grids are (h, w) arrays over the tokens of an image, in raster order.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE_PX = 512
_TITLE_PX, _GAP_PX, _STRIP_PX = 24, 8, 40
_LINES_FROM_PX = 12
_TINT, _DIM = 0.45, 0.25
_GOLDEN = 0.618034
_INK, _PAPER = (20, 20, 20), (255, 255, 255)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
D = TypeVar("D", bound=np.generic)


def groups_panel(image: Image.Image, slot_YX: Ints) -> Image.Image:
    """Each group of tokens in a tint of its own, with lines between groups where there is room for them.

    A token that is alone has no tint.
    """
    sizes = np.bincount(slot_YX.ravel())
    tint = np.array([_color(slot) for slot in range(len(sizes))])[slot_YX]
    strength = np.where(sizes[slot_YX] > 1, _TINT, 0.0)
    tinted = _pixels(image)
    strength_px = _blown(strength)[..., None]
    tinted = tinted * (1 - strength_px) + _blown(tint) * strength_px
    has_room = SIDE_PX >= _LINES_FROM_PX * max(slot_YX.shape)
    return _with_lines(tinted, _blown(slot_YX)) if has_room else _image(tinted)


def kept_panel(image: Image.Image, is_kept_YX: NDArray[np.bool_]) -> Image.Image:
    """The image with every token dark that did not stay."""
    return _image(_pixels(image) * np.where(_blown(is_kept_YX), 1.0, _DIM)[..., None])


def arrows_panel(image: Image.Image, slot_YX: Ints, anchors: Sequence[int]) -> Image.Image:
    """A line from every token that left to the one that it merged into, which has a dot."""
    height, width = slot_YX.shape
    panel = _image(_pixels(image) * 0.7 + 255 * 0.3)
    pen = ImageDraw.Draw(panel)
    step = np.array([SIDE_PX / width, SIDE_PX / height])
    target = np.array(anchors)[slot_YX.ravel()]
    for token in range(height * width):
        if target[token] == token:
            continue
        ends = [(np.array([place % width, place // width]) + 0.5) * step for place in (token, target[token])]
        pen.line([tuple(end) for end in ends], fill=_ink(slot_YX.ravel()[token]), width=2)
    merged = np.bincount(slot_YX.ravel()) > 1
    for slot, anchor in enumerate(anchors):
        if merged[slot]:
            x, y = (np.array([anchor % width, anchor // width]) + 0.5) * step
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_ink(slot), outline=_INK)
    return panel


def heat_panel(image: Image.Image, value_YX: Floats) -> Image.Image:
    """Values as colour over the image in gray: blue for the lowest rank, over green, to red for the highest."""
    rank = value_YX.ravel().argsort(kind="stable").argsort(kind="stable").reshape(value_YX.shape)
    share = rank / max(1, rank.size - 1)
    heat = np.array([colorsys.hsv_to_rgb(0.66 * (1 - one), 1.0, 1.0) for one in share.ravel()]) * 255
    gray = _pixels(image.convert("L").convert("RGB"))
    return _image(gray * 0.35 + _blown(heat.reshape(*value_YX.shape, 3)) * 0.65)


def layers_strip(runs: Sequence[bool], width: int) -> Image.Image:
    """One box for each decoder layer, filled where it runs."""
    strip = Image.new("RGB", (width, _STRIP_PX), _PAPER)
    pen = ImageDraw.Draw(strip)
    each = min(64.0, width / len(runs))
    for layer, is_run in enumerate(runs):
        box = (layer * each + 2, 4, (layer + 1) * each - 3, _STRIP_PX - 5)
        pen.rectangle(box, fill=(60, 120, 200) if is_run else _PAPER, outline=_INK)
        pen.text((box[0] + 4, 12), str(layer), fill=_PAPER if is_run else _INK, font_size=12)
    return strip


def sheet(panels: Sequence[tuple[str, Image.Image]], strip: Image.Image | None = None) -> Image.Image:
    """Panels side by side under their titles, and a strip below."""
    width = len(panels) * (SIDE_PX + _GAP_PX) - _GAP_PX
    below = 0 if strip is None else strip.height + _GAP_PX
    page = Image.new("RGB", (width, _TITLE_PX + SIDE_PX + below), _PAPER)
    pen = ImageDraw.Draw(page)
    for column, (title, panel) in enumerate(panels):
        left = column * (SIDE_PX + _GAP_PX)
        pen.text((left + 2, 4), title, fill=_INK, font_size=14)
        page.paste(panel, (left, _TITLE_PX))
    if strip is not None:
        page.paste(strip, (0, _TITLE_PX + SIDE_PX + _GAP_PX))
    return page


def enlarged(image: Image.Image) -> Image.Image:
    """The image at the size of a panel."""
    return image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> Floats:
    return np.asarray(enlarged(image), dtype=np.float64)


def _image(pixels: Floats) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _blown(grid: NDArray[D]) -> NDArray[D]:
    """Repeats the entries of a grid to the size of a panel."""
    rows, columns = (np.arange(SIDE_PX) * count // SIDE_PX for count in grid.shape[:2])
    blown: NDArray[D] = grid[rows][:, columns]
    return blown


def _with_lines(pixels: Floats, slot_px: Ints) -> Image.Image:
    edge = np.zeros(slot_px.shape, dtype=bool)
    edge[1:] |= slot_px[1:] != slot_px[:-1]
    edge[:, 1:] |= slot_px[:, 1:] != slot_px[:, :-1]
    return _image(np.where(edge[..., None], np.array(_INK, dtype=np.float64), pixels))


def _color(slot: int) -> tuple[float, float, float]:
    red, green, blue = colorsys.hsv_to_rgb(slot * _GOLDEN % 1, 0.75, 1.0)
    return red * 255, green * 255, blue * 255


def _ink(slot: int) -> tuple[int, int, int]:
    red, green, blue = (int(0.7 * channel) for channel in _color(slot))
    return red, green, blue
