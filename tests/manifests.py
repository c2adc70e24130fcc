"""What the tests of the manifest share: a run of the command in the current folder, and what it has left there."""

from __future__ import annotations

import json
from pathlib import Path

from gen_turbo.commands import cli


def generate(*arguments: str) -> int:
    """Draws new images of those in `in`; gives the exit code."""
    return cli.main(["caption-generate", "in", "--output", "out", *arguments])


def lines_of(path: str = "out/manifest.jsonl") -> list[dict]:
    """The lines of an export."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
