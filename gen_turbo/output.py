"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from gen_turbo.config import ConfigError

_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SLUG_LENGTH = 40


def picture_paths(output: str, names: list[str]) -> list[Path]:
    """The PNG file of each picture: one named file, or numbered files in a folder.

    Args:
        output: A path that ends in .png, or a folder. Neither needs to exist.
        names: What each picture shows, for the files' names.

    Raises:
        ConfigError: If several pictures would go into one file, or the output is of another format.
    """
    path = Path(output).expanduser()
    if path.suffix.lower() in _OTHER_PICTURES:
        raise ConfigError(f"pictures are written as PNG; got the output {output}, name a .png file or a folder")
    if path.suffix.lower() != ".png":
        return [path / f"{index:03d}-{_slug(name)}.png" for index, name in enumerate(names)]
    if path.is_dir():
        raise ConfigError(f"the output {output} is a folder; name a file or a folder without .png at its end")
    if len(names) > 1:
        raise ConfigError(f"{len(names)} pictures do not fit into the one file {output}; give a folder as output")
    return [path]


def record_path(output: str) -> Path:
    """The JSON file beside the pictures: the same name for one named file, comparison.json in a folder."""
    path = Path(output).expanduser()
    return path.with_suffix(".json") if path.suffix.lower() == ".png" else path / "comparison.json"


def check_writable(folder: Path) -> None:
    """Tries to write into a folder that need not exist, and leaves no trace.

    Raises:
        ConfigError: If the folder cannot be made or written to.
    """
    made: list[Path] = []
    try:
        for part in [*reversed(folder.parents), folder]:
            if not part.exists():
                part.mkdir()
                made.append(part)
        probe = folder / f".{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        for part in reversed(made):
            part.rmdir()


def write_picture(path: Path, image: Image.Image) -> None:
    """Writes a PNG under a temporary name and renames it; folders are made."""
    _write(path, lambda partial: image.save(partial, format="PNG"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it; folders are made."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text under a temporary name and renames it; folders are made."""
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_SLUG_LENGTH].rstrip("-") or "picture"
