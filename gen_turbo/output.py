"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from gen_turbo.config import ConfigError

_OTHER_IMAGES = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SLUG_LENGTH = 40


def image_paths(output: str, names: list[str]) -> list[Path]:
    """The PNG file of each image: one named file, or numbered files in a folder.

    Args:
        output: A path that ends in .png, or a folder. Neither needs to exist.
        names: What each image shows, for the files' names.

    Raises:
        ConfigError: If several images would go into one file, or the output is of another format.
    """
    path = Path(output).expanduser()
    if path.suffix.lower() in _OTHER_IMAGES:
        raise ConfigError(f"images are written as PNG; got the output {output}, name a .png file or a folder")
    if path.suffix.lower() != ".png":
        return [path / f"{index:03d}-{_slug(name)}.png" for index, name in enumerate(names)]
    if path.is_dir():
        raise ConfigError(f"the output {output} is a folder; name a file or a folder without .png at its end")
    if len(names) > 1:
        raise ConfigError(f"{len(names)} images do not fit into the one file {output}; give a folder as output")
    return [path]


def record_path(output: str) -> Path:
    """The JSON file beside the images: the same name for one named file, comparison.json in a folder."""
    path = Path(output).expanduser()
    return path.with_suffix(".json") if path.suffix.lower() == ".png" else path / "comparison.json"


def check_writable(folder: Path) -> None:
    """Tries to write into a folder that need not exist, and removes its trace.

    Raises:
        ConfigError: If the folder cannot be made or written to.
    """
    nearest = next(part for part in (folder, *folder.absolute().parents) if os.path.lexists(part))
    try:
        # A file without a name: nothing to take away, and nothing for another run to stumble over.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from error


def png_of(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_image(path: Path, image: Image.Image) -> None:
    """Writes a PNG, whole or not at all; folders are made."""
    write_file(path, png_of(image))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all; folders are made."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text, whole or not at all; folders are made."""
    write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, waits until it is on the disk, and renames it; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        write_synced(partial, content)
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_synced(path: Path, content: bytes) -> None:
    """Makes a new file and waits until it is on the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(partial: Path, path: Path) -> None:
    """Gives a file another name, whatever had it before, and waits until the disk knows."""
    partial.replace(path)
    _sync_names(path.parent)


def add_name(partial: Path, path: Path) -> bool:
    """Gives a file a second name that nothing has, and waits until the disk knows; False where something has it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system on which a file has one name.
        if os.path.lexists(path):
            return False
        partial.replace(path)
    _sync_names(path.parent)
    return True


def _sync_names(folder: Path) -> None:
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_SLUG_LENGTH].rstrip("-") or "image"
