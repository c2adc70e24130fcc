"""What was made of which image: a database by which runs that were stopped go on and several share a folder.

Every item has a row. A run claims rows and holds a lock while it lives; claims of dead runs are free again. A result is
written under a temporary name, planned in its row, renamed and committed: the row and the file always say what to do.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gen_turbo.database import open_database, transaction
from gen_turbo.lines import Export, Item, Line, as_json, image_digest, names_of, parsed, sha256_of
from gen_turbo.output import add_name, replace, write_synced

_CLAIM = "INSERT INTO item (input, owner) VALUES (?, ?) ON CONFLICT DO UPDATE SET owner = excluded.owner"
_ADD = "INSERT OR IGNORE INTO item (input, output, line, error) VALUES (?, ?, ?, ?)"
_TEXTS = "SELECT line, error FROM item ORDER BY rowid"
_OTHERS = "SELECT 1 FROM item WHERE output = ? AND input <> ?"


class Manifest:
    """The items of an output, to be used in a `with` statement.

    Beside a file of JSON lines lies a database of the same name; the file is an export, which every run writes anew at
    its end. What is in a file that no run wrote is imported first.

    Attributes:
        path: The file of JSON lines; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._owner = secrets.token_hex(8)

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # A second failure must not hide the first.
        with suppress(*(() if kind is None else (Exception,))):
            self.close()

    def finished(self, item: Item) -> bool:
        """Whether the result of an item is there as it was made."""
        return self._is_begun and self._is_finished(item)

    def claim(self, items: Iterator[Item], most: int) -> list[Item]:
        """Takes the next items that are neither finished nor in the hands of another run."""
        taken: list[Item] = []
        with self._change() as database:
            while len(taken) < most and (item := next(items, None)) is not None:
                owner = self._row(item.path)["owner"]
                if owner and self._is_alive(owner):
                    continue
                if owner:
                    self._settle(item.path)
                if not self._is_finished(item):
                    database.execute(_CLAIM, (os.fsencode(item.path), self._owner))
                    taken.append(item)
        return taken

    def keep(self, item: Item, values: Mapping[str, Any], image: bytes | None = None) -> Line:
        """Commits what was made of a claimed item, and gives its line.

        Args:
            item: What was claimed.
            values: What is noted.
            image: The content of a PNG file that is written beside the manifest.

        Raises:
            ConfigError: If the database takes nothing more.
            OSError: If the image cannot be written.
            ValueError: If JSON has no such value.
        """
        line = item.line(values)
        if image is None:
            with self._change():
                self._set(item.path, line=as_json(line), error=None, owner=None)
            return line
        partial = self._partial(self._owner)
        try:
            write_synced(partial, image)
            return self._place(partial, item, {**line, "sha256": hashlib.sha256(image).hexdigest()})
        finally:
            partial.unlink(missing_ok=True)

    def fail(self, item: Item, message: str, **notes: Any) -> None:
        """Notes what went wrong with a claimed item; what was made of it before stays."""
        with self._change():
            self._settle(item.path)
            self._set(item.path, error=as_json(item.line({"error": message, **notes})))

    def is_quarantined(self, item: Item) -> bool:
        """Whether an item failed as often as its run tried it, and has not changed since."""
        error = parsed(self._row(item.path)["error"]) if self._is_begun else None
        return error is not None and "quarantined" in error and item.is_of(error)

    def lines(self) -> Iterator[Line]:
        """What is known of all items: what was made, and behind it what went wrong."""
        return filter(None, map(parsed, self._texts()))

    def _texts(self) -> list[str]:
        return [text for row in self._database.execute(_TEXTS) for text in row if text is not None]

    def outputs(self) -> set[Path]:
        """The files that runs with this manifest wrote."""
        if self.path is None or not self._is_begun:
            return set()
        names = map(os.fsdecode, self._column("SELECT output FROM item WHERE output IS NOT NULL"))
        return {(self.path.parent / name).resolve() for name in names}

    def close(self) -> None:
        """Writes the export, and gives back what is claimed and not done: nobody holds its lock any more."""
        if "_database" not in vars(self):
            return
        try:
            if self.path is not None:
                with self._change():
                    self._export(self.path)
        finally:
            self._database.close()
            del self._database
            if self.path is not None:
                self._take_away(self._owner)

    @property
    def _is_begun(self) -> bool:
        """Whether there is anything to read: a look makes no files."""
        return "_database" in vars(self) or (self.path is not None and (self.path.exists() or self._file.exists()))

    @property
    def _file(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".sqlite")

    @cached_property
    def _database(self) -> sqlite3.Connection:
        """The open database: what dead runs left is settled, and what is new in the file of JSON lines is imported."""
        if self.path is None:
            return open_database(":memory:")
        content = self.path.read_bytes() if self.path.exists() else b""
        export = Export.of(self.path, content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._database = database = open_database(self._file)
        with self._change():
            self._lock.acquire()
            self._recover()
            if content and hashlib.sha256(content).hexdigest() not in self._column("SELECT sha256 FROM export"):
                self._import(self.path, export)
        return database

    def _change(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._database)

    def _row(self, path: Path) -> dict[str, Any]:
        found = self._database.execute("SELECT * FROM item WHERE input = ?", (os.fsencode(path),)).fetchone()
        row = dict(found or dict.fromkeys(("owner", "line", "planned", "error")))
        return row | {name: parsed(row[name]) for name in ("line", "planned")}

    def _column(self, query: str, *values: Any) -> list[Any]:
        return [row[0] for row in self._database.execute(query, values)]

    def _set(self, path: Path, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._database.execute(f"UPDATE item SET {names} WHERE input = ?", (*values.values(), os.fsencode(path)))

    def _is_finished(self, item: Item) -> bool:
        line = self._row(item.path)["line"]
        return line is not None and item.is_of(line) and self._is_there(line)

    def _is_there(self, line: Line) -> bool:
        """Whether the file of a line is as it was made."""
        if "output" not in line:
            return True
        assert self.path is not None
        return sha256_of(self.path.parent / line["output"]) == line.get("sha256") != ""

    def _place(self, partial: Path, item: Item, line: Line) -> Line:
        """Gives an image that is on the disk a name that is its item's already, or that nothing has."""
        assert self.path is not None
        before = self._row(item.path)["line"] or {}
        old = before.get("output")
        # Nothing is lost with an empty file.
        is_own = old is not None and (self._is_there(before) or _is_empty(self.path.parent / old))
        for name in chain([old] if old else (), names_of(item.path)):
            planned = {**line, "output": name}
            if not self._plan(item.path, planned):
                continue
            if is_own and name == old:
                replace(partial, self.path.parent / name)
            elif not add_name(partial, self.path.parent / name):
                continue
            with self._change():
                self._settle(item.path)
            return planned
        raise AssertionError("there is always another name")

    def _plan(self, path: Path, planned: Line) -> bool:
        """Notes what is about to get a name; False if the name is another item's."""
        name = os.fsencode(planned["output"])
        with self._change():
            if self._column(_OTHERS, name, os.fsencode(path)):
                return False
            self._set(path, output=name, planned=as_json(planned))
        return True

    def _settle(self, path: Path) -> None:
        """Ends a claim: what was planned and is there is done, anything else was never begun."""
        row = self._row(path)
        line = row["line"]
        if row["planned"] is not None and self._is_there(row["planned"]):
            line = row["planned"]
            self._set(path, line=as_json(line), error=None)
        output = os.fsencode(line["output"]) if line and "output" in line else None
        self._set(path, owner=None, planned=None, output=output)

    def _settle_claims_of(self, owner: str) -> None:
        for path in self._column("SELECT input FROM item WHERE owner = ?", owner):
            self._settle(Path(os.fsdecode(path)))

    def _recover(self) -> None:
        """Settles what dead runs had claimed, and takes their files away."""
        assert self.path is not None
        owners = set(self._column("SELECT DISTINCT owner FROM item WHERE owner IS NOT NULL"))
        pattern = re.compile(re.escape(self._partial("OWNER").stem).replace("OWNER", "([0-9a-f]{16})") + r"\.lock")
        owners |= {found[1] for found in map(pattern.fullmatch, os.listdir(self.path.parent)) if found}
        for owner in owners:
            if not self._is_alive(owner):
                self._settle_claims_of(owner)

    def _partial(self, owner: str) -> Path:
        assert self.path is not None
        return self.path.with_name(f".{self.path.stem[:50]}-{owner}.partial")

    def _lock_of(self, owner: str) -> FileLock:
        return FileLock(self._partial(owner).with_suffix(".lock"), timeout=0)

    @cached_property
    def _lock(self) -> FileLock:
        return self._lock_of(self._owner)

    def _is_alive(self, owner: str) -> bool:
        """Whether a run still holds its lock; what a dead one left besides is taken away."""
        if owner == self._owner:
            return True
        if not re.fullmatch("[0-9a-f]{16}", owner) or not self._partial(owner).with_suffix(".lock").exists():
            return False
        try:
            self._lock_of(owner).acquire().lock.release()
        except Timeout:
            return True
        self._take_away(owner)
        return False

    def _take_away(self, owner: str) -> None:
        """Takes the files of a run away, its lock last."""
        if owner == self._owner:
            self._lock.release()
        for file in (self._partial(owner), self._partial(owner).with_suffix(".lock")):
            file.unlink(missing_ok=True)

    def _import(self, path: Path, export: Export) -> None:
        """Takes over what is not known; the file itself is kept too if it has lines that cannot be read."""
        for name in {**export.lines, **export.errors}:
            line, error = export.lines.get(name), export.errors.get(name)
            output = None
            if line is not None and "output" in line:
                output = os.fsencode(line["output"])
                line.setdefault("sha256", image_digest(path.parent / line["output"]))
            texts = [as_json(one) if one is not None else None for one in (line, error)]
            self._database.execute(_ADD, (os.fsencode(name), output, *texts))
        if not export.is_whole:
            next(n for n in count(1) if add_name(path, path.with_name(f"{path.name}.{n}.old")))

    def _export(self, path: Path) -> None:
        content = "".join(f"{text}\n" for text in self._texts()).encode()
        self._database.execute("DELETE FROM export")
        self._database.execute("INSERT INTO export VALUES (?)", [hashlib.sha256(content).hexdigest()])
        partial = self._partial(self._owner)
        try:
            write_synced(partial, content)
            replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0
