"""Pictures that a user names: files, folders and patterns, opened one by one."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from gen_turbo.config import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What counts as a picture in a folder; a file named outright may have any name."""


def find_pictures(sources: Sequence[str | Path]) -> list[Path]:
    """The files behind names, in the order of the names, and sorted within each; none occurs twice.

    Args:
        sources: Files, folders (whose pictures are taken, not those of folders inside), and patterns such as
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
            what = "holds no pictures" if path.is_dir() else "does not exist"
            raise ConfigError(f"{source} {what}; name pictures, folders of pictures or a pattern such as 'in/*.png'")
        found.update(dict.fromkeys(files))
    return list(found)


def open_picture(path: Path) -> Image.Image:
    """Reads one picture as RGB, the way up that its camera noted; transparent parts become white.

    Raises:
        ConfigError: If the file cannot be read or is no picture.
    """
    try:
        with Image.open(path) as file:
            picture: Image.Image = ImageOps.exif_transpose(file)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            return picture.convert("RGB")
    # What damaged pictures raise has no common class: their readers raise whatever comes.
    except Exception as error:
        raise ConfigError(f"cannot read the picture {path}: {' '.join(str(error).split())}") from error


def pictures_of(source: Any) -> list[Image.Image]:
    """Opens what a caller gave: a picture, a path, a folder, a pattern, or a list of any of these.

    Raises:
        ConfigError: If there is nothing, or something is none of these or cannot be read.
    """
    if isinstance(source, Image.Image):
        return [source]
    if isinstance(source, (str, Path)):
        return [open_picture(path) for path in find_pictures([source])]
    if not isinstance(source, (list, tuple)) or not source:
        raise ConfigError(f"expected a picture, a path, a folder or a list of these; got {source!r:.80}")
    return [picture for one in source for picture in pictures_of(one)]
