"""One image's work as a line of JSON, and the names of what is made of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from PIL import Image

from gen_turbo.config import ConfigError

Line = dict[str, Any]
"""What was made of an item, or what went wrong."""
_LONGEST_NAME = 255
_MOST_TRIED = 16
_START = b'{"input"'


@dataclass(frozen=True)
class Item:
    """One image to work on under some settings.

    Attributes:
        path: The file, absolute.
        digest: Of its content; empty where it cannot be read.
        settings: Digest of everything that the result depends on beside the image.
    """

    path: Path
    digest: str
    settings: str

    @classmethod
    def of(cls, path: Path, settings: str) -> Item:
        """Reads the file for its digest."""
        return cls(path.resolve(), sha256_of(path)[:16], settings)

    def line(self, values: Mapping[str, Any]) -> Line:
        """What was made of it, with what it was made from."""
        return {"input": str(self.path), "digest": self.digest, "settings": self.settings, **values}

    def is_of(self, line: Line) -> bool:
        """Whether a line is about this content under these settings."""
        return bool(self.digest) and (line["digest"], line["settings"]) == (self.digest, self.settings)


@dataclass
class Export:
    """What a file of lines says.

    Attributes:
        lines: The last line of each image that something was made of.
        errors: The line behind it that says what went wrong.
        is_whole: Whether every line could be read; one that was cut off at the end of the file was never noted.
    """

    lines: dict[str, Line] = field(default_factory=dict)
    errors: dict[str, Line] = field(default_factory=dict)
    is_whole: bool = True

    @classmethod
    def of(cls, path: Path, content: bytes) -> Export:
        """Reads the content of a file; raises ConfigError if no line of it is of this kind."""
        *texts, rest = content.split(b"\n")
        if content.strip() and not any(text.startswith(_START) for text in (*texts, rest)):
            raise ConfigError(f"{path} is no manifest: it has the line {content[:60]!r}; name another output")
        export = cls()
        for text in filter(bytes.strip, texts):
            line = parsed(text)
            if line is None:
                export.is_whole = False
            elif "error" in line:
                export.errors[line["input"]] = line
            else:
                export.lines[line["input"]] = line
                export.errors.pop(line["input"], None)
        return export


def parsed(text: bytes | str | None) -> Line | None:
    """The line in a text; None if it is none, or names a file that its input would not be given."""
    try:
        line = json.loads(text or "")
        is_one = all(isinstance(line[name], str) for name in ("input", "digest", "settings", *({"output"} & set(line))))
        # Fails where a number is none of JSON's or a path is none of this system's.
        as_json(line), os.fsencode(line["input"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_own = "output" not in line or line["output"] in islice(names_of(Path(line["input"])), _MOST_TRIED)
    return dict(line) if is_one and is_own else None


def as_json(line: Line) -> str:
    """The text of a line; raises ValueError for numbers that JSON has not."""
    return json.dumps(line, allow_nan=False)


def names_of(path: Path) -> Iterator[str]:
    """Names for the image that is made of one: its own first, then ever others, none longer than a name may be."""
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    for tail in chain(("", f"-{mark}"), (f"-{mark}-{number}" for number in count(2))):
        tail += ".png"
        stem = os.fsencode(path.stem)
        most = _LONGEST_NAME - len(tail)
        yield (path.stem if len(stem) <= most else stem[:most].decode(errors="ignore")) + tail


def sha256_of(path: Path) -> str:
    """The digest of a file; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""


def image_digest(path: Path) -> str:
    """The digest of a file that is a whole image; empty if it is none."""
    try:
        with Image.open(path) as image:
            image.verify()
    # What damaged images raise has no common class.
    except Exception:
        return ""
    return sha256_of(path)


def digest_of(settings: Any) -> str:
    """Twelve hexadecimal digits that change with any setting; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
