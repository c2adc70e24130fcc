"""The database of a manifest: what it holds, how it is opened, and changes that are made whole or not at all."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gen_turbo.schemas import ConfigError

_APPLICATION = 0x67745F31
"""Marks the file in its header, so that no other program's is written to."""
_TABLES = (
    "CREATE TABLE item (input BLOB PRIMARY KEY, owner TEXT, output BLOB UNIQUE, line TEXT, planned TEXT, error TEXT)",
    "CREATE TABLE export (sha256 TEXT)",
)
_SCHEMA = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
_WAIT_S, _PAUSE_S = 60.0, 0.05


def open_database(path: Path | str) -> sqlite3.Connection:
    """Opens a database, or makes one; several processes may do so at once.

    Raises:
        ConfigError: If the file is something else, which is then left alone, or it cannot be written to.
    """
    _check_header(Path(path))
    end_s = time.monotonic() + _WAIT_S
    while True:
        database = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
        database.row_factory = sqlite3.Row
        try:
            with transaction(database):
                _make_tables(database)
            # Only now, for the mark of the file must be in its header whatever happens.
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "trusted_schema = OFF"):
                database.execute(f"PRAGMA {pragma}")
            return database
        except (sqlite3.Error, ConfigError) as error:
            database.close()
            # To change the journal needs the file alone, and SQLite does not wait for that.
            if "locked" not in str(error) or time.monotonic() > end_s:
                raise ConfigError(f"cannot open {path}: {error}") from error
            time.sleep(_PAUSE_S)


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A change, alone among all processes, made whole or not at all; raises ConfigError where it cannot be made."""
    try:
        database.execute("BEGIN IMMEDIATE")
        yield database
        database.execute("COMMIT")
    except sqlite3.Error as error:
        raise ConfigError(f"cannot note what was done: {error}") from error
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _make_tables(database: sqlite3.Connection) -> None:
    known = tuple(row["sql"] for row in database.execute(_SCHEMA))
    if not known:
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        for table in _TABLES:
            database.execute(table)
    elif known != _TABLES:
        raise ConfigError("it is of another version of this program; name another output")


def _check_header(path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(f"{path} is a link; name another output")
    if not path.exists():
        return
    with path.open("rb") as file:
        header = file.read(72)
    if header and (header[:16] != b"SQLite format 3\0" or int.from_bytes(header[68:]) != _APPLICATION):
        raise ConfigError(f"{path} is no manifest of this program; name another output")
