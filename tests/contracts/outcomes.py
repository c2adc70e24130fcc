"""Checks every combination and writes COMBINATIONS.md: python -m tests.contracts.outcomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from stated import TurboProcessor
from torch import Tensor

from gen_turbo import attach, report
from tests.contracts.combinations import COMBINATIONS, Combination
from tests.snapshots import differences, model_state

TABLE = Path(__file__).parent / "COMBINATIONS.md"
REDUCING = {"ratio": 0.4, "warmup_steps": 1, "full_every": 4}
_HEAD = """# What goes together with a processor

Every cell is the outcome of a check on real classes at a tiny size with random weights; a test compares each with this
table, which `python -m tests.contracts.outcomes` writes. "Reduced" and "whole blocks" are `TurboProcessor(0.4)` with
remembered detail in its two scopes: how many layers ran on fewer tokens, and on how many. "Attached first" attaches
before the addition is made, draws, detaches and draws again.
"""


@dataclass
class Made:
    """A combination that its cells share, and what it draws without a processor and with one.

    Attributes:
        left: What differs in the model after the processor was detached, but for what a stock run changes.
    """

    row: Combination
    whole: Any
    stock: Tensor
    reduced: Tensor
    effect: str
    left: list[str]

    @classmethod
    def of(cls, row: Combination) -> Made:
        """Draws the first images."""
        whole = row.whole()
        untouched = model_state(row.model(whole))
        stock = row.draw(whole)
        before = model_state(row.model(whole))
        own = differences(untouched, before)
        with attach(row.target(whole), TurboProcessor(**REDUCING)):
            reduced = row.draw(whole)
            effect = _effect(row, whole, reduced, stock)
        left = [key for key in differences(before, model_state(row.model(whole))) if key not in (*own, "random")]
        return cls(row, whole, stock, reduced, effect, left)


def _effect(row: Combination, whole: Any, reduced: Tensor, stock: Tensor) -> str:
    told = report(row.target(whole))
    ran = [layer for layer in told.layers if layer.num_reduced]
    assert ran and reduced.shape == stock.shape and reduced.isfinite().all()
    assert 0 < (reduced - stock).norm() < stock.norm()
    return f"{len(ran)}: {ran[0].num_tokens}\u2192{ran[0].num_kept}"


def _nothing(made: Made) -> str:
    with attach(made.row.target(made.whole), TurboProcessor(0.0)):
        assert torch.equal(made.row.draw(made.whole), made.stock)
    return "bit-identical"


def _blocks(made: Made) -> str:
    row = made.row
    with attach(row.target(made.whole), TurboProcessor(**REDUCING, scope="block")):
        try:
            return _effect(row, made.whole, row.draw(made.whole), made.stock)
        except ValueError as error:
            return f"refused: {str(error).split(', which')[0]}"


def _detached(made: Made) -> str:
    assert torch.equal(made.row.draw(made.whole), made.stock)
    assert not made.left
    return "as before"


def _first(made: Made) -> str:
    row, other = made.row, made.row.make()
    attachment = attach(row.target(other), TurboProcessor(**REDUCING))
    row.add(other)
    assert torch.equal(row.draw(other), made.reduced)
    attachment.detach()
    assert torch.equal(row.draw(other), made.stock)
    return "same images"


COLUMNS: dict[str, Callable[[Made], str]] = {
    "nothing removed": _nothing,
    "reduced": lambda made: made.effect,
    "whole blocks": _blocks,
    "detached": _detached,
    "attached first": _first,
}


@cache
def _made(name: str) -> Made:
    return Made.of(COMBINATIONS[name])


def is_absent(name: str) -> bool:
    """Whether a row needs a package that is not installed."""
    needs = COMBINATIONS[name].needs
    return bool(needs) and find_spec(needs) is None


def cell(name: str, column: str) -> str:
    """Runs one check and says what came out; a check that fails raises AssertionError.

    Of a row whose package is not there the table says what it said before.
    """
    if is_absent(name):
        return read()[name, column]
    return COLUMNS[column](_made(name))


def read() -> dict[tuple[str, str], str]:
    """The cells of the written table by row and column."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {(row[0], column): value for row in rows[2:] for column, value in zip(rows[0][1:], row[1:], strict=True)}


def write() -> None:
    """Writes the table."""
    rows = [["combined with", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[name, *(cell(name, column) for column in COLUMNS)] for name in COMBINATIONS]
    TABLE.write_text(_HEAD + "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
