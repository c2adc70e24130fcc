"""What scenes are made of: colours, shapes, sizes, places and the words for them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first of two objects lies, seen from the second, as a direction (x, y)."""
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
WORDS = tuple(sorted({"a", "on", "the", "of", "background", *COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *POSITIONS}))
"""Every word that a caption of one object may contain; those of two objects also say above and below."""

Array = npt.NDArray[np.floating]
YY, XX = np.mgrid[0:SIZE_PX, 0:SIZE_PX].astype(np.float32) / (SIZE_PX / 2) - 1
