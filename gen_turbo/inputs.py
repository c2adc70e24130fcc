"""Images that a user names: files, folders and patterns, opened one by one."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gen_turbo.config import ConfigError
from gen_turbo.schemas import reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What counts as an image in a folder; a file named outright may have any name."""
_BITS, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1
"""Tags of TIFF."""
_OF_16_BITS = ("PNG", "PPM")
"""Formats whose 16 bits may be read as whole numbers of 32."""


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """The files behind names, in the order of the names, and sorted within each; none occurs twice.

    Args:
        sources: Files, folders (whose images are taken, not those of folders inside), and patterns such as
            `photos/**/*.jpg`.

    Raises:
        ConfigError: If a name stands for nothing.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files = [path]
        else:
            matches = (Path(match) for match in glob.glob(str(path), recursive=True))
            files = sorted(match for match in matches if match.is_file())
        if not files:
            what = "holds no images" if path.is_dir() else "does not exist"
            raise ConfigError(f"{source} {what}; name images, folders of images or a pattern such as 'in/*.png'")
        found.update(dict.fromkeys(files))
    return list(found)


def open_image(path: Path) -> Image.Image:
    """Reads one image as RGB, the way up that its camera noted; transparent parts become white.

    Raises:
        ConfigError: If the file cannot be read or is no image.
    """
    try:
        with Image.open(path) as file:
            _refuse_odd_tiff(file)
            file.load()
            return as_rgb(ImageOps.exif_transpose(file), file.format)
    except UnidentifiedImageError as error:
        raise ConfigError(f"cannot read the image {path}: it is no image that Pillow knows") from error
    # What damaged images raise has no common class: their readers raise whatever comes.
    except Exception as error:
        raise ConfigError(f"cannot read the image {path}: {reason(error)}") from error


def _refuse_odd_tiff(file: Any) -> None:
    """Refuses numbers whose white is not that of their type, which the reader would pass over."""
    tags = getattr(file, "tag_v2", {})
    is_odd = tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO) != _BLACK_IS_ZERO or tags.get(_BITS, (16,))[0] not in (16, 32, 64)
    if is_odd and (file.mode.startswith("I;16") or file.mode == "F"):
        raise ConfigError("white is zero in it, or it has 12 bits; save it with 8 or 16 bits")


def as_rgb(image: Image.Image, form: str | None = None) -> Image.Image:
    """An image of any mode as RGB of 8 bits; transparent parts become white.

    Args:
        image: 16 bits run from 0 to 65535, and floating numbers from 0 to 1.
        form: The format of its file; None for an image that was made in memory.

    Raises:
        ConfigError: If nothing says which number is white.
    """
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and form in _OF_16_BITS):
        image = _grey(image, np.asarray(image) / 257.0, image.info.get("transparency"))
    elif mode == "F":
        image = _grey(image, np.asarray(image) * 255.0, None)
    elif mode == "I":
        raise ConfigError("whole numbers of 32 bits have no known white; save it with 8 or 16 bits")
    elif mode == "La":
        # Premultiplied grey has no way to RGB but this one.
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _grey(image: Image.Image, values: np.ndarray[Any, Any], clear: int | None) -> Image.Image:
    """Grey values as 8 bits; `clear` is the value of the file that means transparent."""
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
        raise ConfigError("its values do not lie between black and white: 0 and 1 for floating numbers")
    grey = Image.fromarray(values.round().astype(np.uint8))
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    return grey


def images_of(source: Any) -> list[Image.Image]:
    """Opens what a caller gave: an image, a path, a folder, a pattern, or a list of any of these.

    Raises:
        ConfigError: If there is nothing, or something is none of these or cannot be read.
    """
    if isinstance(source, Image.Image):
        return [as_rgb(source, source.format)]
    if isinstance(source, (str, Path)):
        return [open_image(path) for path in find_images([source])]
    if not isinstance(source, (list, tuple)) or not source:
        raise ConfigError(f"expected an image, a path, a folder or a list of these; got {source!r:.80}")
    return [image for one in source for image in images_of(one)]
