"""What was made of which picture: a file of JSON lines by which a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gen_turbo.config import ConfigError
from gen_turbo.output import write_text


@dataclass(frozen=True)
class Item:
    """One picture to work on under some settings.

    Attributes:
        path: The file, absolute.
        digest: Of its content.
        settings: Digest of everything that the result depends on beside the picture.
    """

    path: Path
    digest: str
    settings: str

    @classmethod
    def of(cls, path: Path, settings: str) -> Item:
        """Reads the file for its digest; one that cannot be read has an empty digest."""
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        except OSError:
            digest = ""
        return cls(path.resolve(), digest, settings)


@dataclass
class Manifest:
    """The lines of a manifest; the last successful one of a picture counts.

    Attributes:
        path: The file; None keeps nothing.
        entries: The line that counts, by picture.
    """

    path: Path | None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None) -> Manifest:
        """Reads a manifest, which need not exist; what a killed run left unfinished at its end is taken away.

        Raises:
            ConfigError: If the file is there and is something else.
        """
        manifest = cls(path)
        if path is None or not path.exists():
            return manifest
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}; name another output") from error
        *lines, rest = text.split("\n")
        for line in lines:
            manifest._note(_parsed(path, line))
        if rest:
            write_text(path, "".join(f"{line}\n" for line in lines))
        return manifest

    def finished(self, item: Item) -> dict[str, Any] | None:
        """The entry of an item whose result is still there; None if the item has to be done, again or at all."""
        entry = self.entries.get(str(item.path))
        if entry is None or not item.digest or (entry["digest"], entry["settings"]) != (item.digest, item.settings):
            return None
        output = entry.get("output")
        is_there = output is None or self.path is None or (self.path.parent / output).is_file()
        return entry if is_there else None

    def add(self, item: Item, values: dict[str, Any]) -> None:
        """Appends the line of an item; what was made of it must be on disk before."""
        entry = {"input": str(item.path), "digest": item.digest, "settings": item.settings, **values}
        self._note(entry)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write without a buffer: a line is there whole or not at all, or is cut at its end and then not read.
        with self.path.open("ab", buffering=0) as file:
            file.write((json.dumps(entry, allow_nan=False) + "\n").encode())

    def output_name(self, item: Item, suffix: str) -> str:
        """The file, beside the manifest, for the result of an item: never one that belongs to anything else."""
        assert self.path is not None
        before = self.entries.get(str(item.path), {}).get("output")
        if isinstance(before, str):
            return before
        name = f"{item.path.stem}{suffix}"
        if not (self.path.parent / name).exists():
            return name
        return f"{item.path.stem}-{hashlib.sha256(str(item.path).encode()).hexdigest()[:8]}{suffix}"

    def outputs(self) -> set[Path]:
        """The files that this manifest's runs wrote."""
        if self.path is None:
            return set()
        names = [entry["output"] for entry in self.entries.values() if "output" in entry]
        return {(self.path.parent / name).resolve() for name in names}

    def _note(self, entry: dict[str, Any]) -> None:
        if "error" not in entry:
            self.entries[entry["input"]] = entry


def digest_of(settings: Any) -> str:
    """Twelve hexadecimal digits that change with any setting; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if not all(isinstance(entry[name], str) for name in ("input", "digest", "settings")):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no manifest: it has the line {line[:60]!r}; name another output") from error
    return dict(entry)
