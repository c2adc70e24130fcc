"""The items of a batch: prompts or images from JSON lines, CSV, Parquet or a folder, each with an id and a seed."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gen_turbo.config import ConfigError
from gen_turbo.inputs import find_images
from gen_turbo.lines import Item, as_json
from gen_turbo.schemas import LARGEST_SEED

FORMATS = (".jsonl", ".csv", ".parquet")
_OWN = ("id", "prompt", "image", "seed")
NOTES = ("input", "digest", "settings", "sha256", "quarantined", "tries")
"""What the manifest notes of an item beside its results."""
_LONGEST_ID = 200


@dataclass(frozen=True)
class Row:
    """One item.

    Attributes:
        id: Names it; the seed follows from it.
        prompt: A prompt, or what is asked about the image; None for none.
        image: The image's file; None where an image is made from a prompt.
        seed: Of the noise; None derives it from the id.
        extra: Other columns, which results repeat.
    """

    id: str
    prompt: str | None = None
    image: Path | None = None
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def seed_of(self, run: int) -> int:
        """The seed of its noise: its own, or one that the run's seed and the id alone decide."""
        if self.seed is not None:
            return self.seed
        digest = hashlib.sha256(f"{run} {self.id}".encode()).digest()
        return int.from_bytes(digest[:4])

    def item(self, source: Path, settings: str) -> Item:
        """What the manifest knows it by: a name under the input, and a digest of all that its result depends on."""
        content = b"" if self.image is None else self.image.read_bytes() if self.image.is_file() else None
        if content is None:
            return Item(self._name(source), "", settings)
        digest = hashlib.sha256(json.dumps([self.prompt, self.seed]).encode() + content).hexdigest()[:16]
        return Item(self._name(source), digest, settings)

    def _name(self, source: Path) -> Path:
        return source.resolve() / f"{quote(self.id, safe=' ')}.item"


def read_rows(source: Path, wants_image: bool) -> list[Row]:
    """Reads all items and refuses what cannot be worked on before anything is done.

    Args:
        source: A file of FORMATS with a column `prompt` or `image`, or a folder of images.
        wants_image: Whether items must have an image; otherwise they must have a prompt.

    Raises:
        ConfigError: If the input cannot be read, a column is missing or of another type, or an id occurs twice.
    """
    if source.is_dir():
        rows = [Row(file.name, image=file) for file in find_images([source])]
    elif source.suffix.lower() not in FORMATS:
        raise ConfigError(f"{source} is neither a folder nor a file of {', '.join(FORMATS)}")
    elif not source.is_file():
        raise ConfigError(f"there is no file {source}")
    else:
        rows = list(_rows(source, _records(source)))
    if not rows:
        raise ConfigError(f"{source} holds no items")
    needed = "image" if wants_image else "prompt"
    for number, row in enumerate(rows, 1):
        if getattr(row, needed) is None:
            raise ConfigError(f"{source}, item {number}: there is no {needed}, and the configuration needs one")
    twice = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise ConfigError(f"{source}: the id {twice[0]!r} occurs twice; every item needs an id of its own")
    return rows


def _records(source: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file as mappings; raises ConfigError naming the row that cannot be read."""
    if source.suffix.lower() == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ConfigError("Parquet needs pyarrow; run: pip install 'gen_turbo[batch]'") from error
        try:
            yield from parquet.read_table(source).to_pylist()
        except ArrowException as error:
            raise ConfigError(f"cannot read {source}: {' '.join(str(error).split())}") from error
        return
    with source.open(encoding="utf-8-sig", newline="") as file:
        try:
            if source.suffix.lower() == ".csv":
                for row in csv.DictReader(file):
                    yield {name: value for name, value in row.items() if value not in (None, "")}
                return
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _mapping(text, f"{source}, line {number}")
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"cannot read {source}: {error}") from error


def _mapping(text: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f'{where} must be an object such as {{"id": "1", "prompt": "a red fox"}}')
    return row


def _rows(source: Path, records: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    seen: Counter[str] = Counter()
    for number, record in enumerate(records, 1):
        given = {name: value for name, value in record.items() if value is not None and name is not None}
        where = f"{source}, item {number}"
        extra = {name: value for name, value in given.items() if name not in _OWN}
        taken = [name for name in extra if name in (*NOTES, "output", "error")]
        if taken:
            raise ConfigError(f"{where}: a column must not be called {taken[0]!r}, as results are; rename it")
        try:
            as_json(extra)
            json.dumps(given, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: texts must be Unicode: {error}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: other columns must be plain values: {error}") from error
        prompt, image = (_text(given, name, where) for name in ("prompt", "image"))
        own = {"prompt": prompt, "image": image, "seed": given.get("seed")}
        digest = hashlib.sha256(json.dumps([own, extra], sort_keys=True).encode()).hexdigest()[:16]
        seen[digest] += 1
        # Without ids an item is named by its content, so that another order changes nothing.
        name = str(given.get("id", digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"))
        if not 0 < len(name) <= _LONGEST_ID:
            raise ConfigError(f"{where}: an id must have 1 to {_LONGEST_ID} characters; got {name!r:.80}")
        path = None if image is None else source.parent / Path(image).expanduser()
        yield Row(name, prompt, path, _seed(given.get("seed"), where), extra)


def _text(given: Mapping[str, Any], name: str, where: str) -> str | None:
    value = given.get(name)
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise ConfigError(f"{where}: {name} must be a text; got {value!r:.80}")
    return value


def _seed(value: Any, where: str) -> int | None:
    if value is None:
        return None
    try:
        seed = int(value)
    except (TypeError, ValueError):
        seed = -1
    if isinstance(value, (bool, float)) or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"{where}: seed must be a whole number from 0 to {LARGEST_SEED}; got {value!r:.80}")
    return seed
