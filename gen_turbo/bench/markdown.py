"""A Markdown table of records, with the commands, machine and commits that made them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from gen_turbo.bench.records import BenchRecord, without

NO_RECORDS = "No records yet."
_SELECTING = ("--settings", "--models", "--pixels", "--records", "--work", "--part", "--modes", "--minutes")
_TIMED = "Medians of CPU seconds (lower to upper quartile)"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], records: Sequence[BenchRecord], what: str = _TIMED
) -> str:
    """Rows under a head, and below what all of them share; NO_RECORDS where there are none.

    Args:
        head: Titles of the columns, the first of which names the rows.
        rows: As many cells each.
        records: Where the rows come from.
        what: What the numbers are.
    """
    if not records:
        return NO_RECORDS
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]
    return "\n".join(lines) + "\n\n" + _origins(records, what)


def _origins(records: Sequence[BenchRecord], what: str) -> str:
    """What all rows share, in one paragraph; where they differ, every value that occurs."""
    commands = dict.fromkeys(f"`{_of_all_rows(record.origin.command)}`" for record in records)
    hardware = dict.fromkeys(record.origin.hardware for record in records)
    versions = dict.fromkeys(f"torch {r.origin.versions.get('torch', 'unknown')}" for r in records)
    dates = sorted({record.origin.date[:10] for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = ", ".join([" and ".join(hardware), *versions, _commits(records), when])
    return f"{what}. {', '.join(commands)}; {where}."


def _of_all_rows(command: str) -> str:
    """A record's command without what selects rows and says where records lie."""
    return shlex.join(without(shlex.split(command), _SELECTING))


def _commits(records: Sequence[BenchRecord]) -> str:
    """The commits in order of measurement; a source that differed from its commit is said."""
    ordered = sorted(records, key=lambda record: record.origin.date)
    commits = list(dict.fromkeys(record.origin.commit.removesuffix("-dirty") for record in ordered))
    named = f"commit {commits[0]}" if len(commits) == 1 else f"commits {commits[0]} to {commits[-1]}"
    is_changed = any(record.origin.commit.endswith("-dirty") for record in records)
    return named + (" with changes" if is_changed else "")
