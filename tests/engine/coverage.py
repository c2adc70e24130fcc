"""Writes COVERAGE.md, the table of families and settings, from the checks: python -m tests.engine.coverage."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.engine.families import COLUMNS, NAMES, cell, family

TABLE = Path(__file__).parent / "COVERAGE.md"
_HEAD = """# What works on which model

Every cell is the outcome of a check on the real class at a tiny size with random weights, at ratio 0.4; the tests
compare each with this table, which `python -m tests.engine.coverage` writes: how many layers of the model that is
checked were reduced, and from how many tokens to how many. "Detached" is every object. "CUDA graphs" is checked on a
stand-in for a GPU, three runs in each of the scopes attention, block and model; a GPU itself refuses Kandinsky 5 and
LTX-2 too, which copy numbers to it in every call.
"""


def lines() -> list[str]:
    """The table, one line per variant of a family."""
    rows = [["model", "variant", *COLUMNS]]
    rows += [[type(family(name)[0]).__name__, name, *(cell(name, column) for column in COLUMNS)] for name in NAMES]
    rule = "|" + " --- |" * len(rows[0])
    text = ["| " + " | ".join(row) + " |" for row in rows]
    return [text[0], rule, *text[1:]]


def read() -> dict[tuple[str, str], str]:
    """The cells of the written table by variant and column."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {(row[1], column): value for row in rows[2:] for column, value in zip(rows[0][2:], row[2:], strict=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    TABLE.write_text(_HEAD + "\n" + "\n".join(lines()) + "\n")
