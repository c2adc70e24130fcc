"""What a reduced layer holds: its phase in the running step, what it remembers of the run, and what it has done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from gen_turbo.engine.run_map import RunMap
from gen_turbo.engine.values import num_bytes


class Phase(Enum):
    """What a reduced layer does in one step."""

    FULL = "full"
    """Runs as in the stock model."""
    REFRESH = "refresh"
    """Runs in full, then on merged tokens, and remembers the difference."""
    REDUCED = "reduced"
    """Runs on merged tokens and adds what is remembered."""

    # That of an enumeration is written in Python, and every layer counts its calls by phase in every step.
    __hash__ = object.__hash__


class SequenceShape(NamedTuple):
    """Tokens of a layer's sequence: image tokens, and others before and behind them; text that shares attention."""

    batch: int
    image: int
    leading: int
    trailing: int
    text: int
    merged_text: int
    caches_text: bool = False
    """Whether the text is keys and values alone, which the model keeps."""


@dataclass
class LayerState:
    """What one layer holds in one run.

    Attributes:
        map: How its sequence is merged; None before its first step that is not a full one.
        base: The same map of the image tokens alone, which layers share.
        weights: One, and the steps since the last refresh; in a refresh, since the one before, or infinity.
        rows: For each argument of positions, the item of a tuple, if it is one, and the rows that are kept.
        details: For each output, what the last refresh found that merging misses and, where that is continued, its
            change per step between the last two refreshes, (1 or 2, ...); allocated once.
        left_alone: Why the layer runs in full for the rest of the run; empty if it does not.
        ratio: The fraction of tokens that `map` removes.
        calls: Steps by phase and by the image tokens kept.
        plan_age: The most steps that a map had served when the layer used it.
        shape: Of its sequence; None before the first step that is not a full one.
        sides: Height and width of the tokens of a frame, as text, which torch.compile takes for a constant where it
            may make numbers symbols; empty where they are no rectangle.
        num_kept: Image tokens after merging.
    """

    weights: Tensor
    map: RunMap | None = None
    base: RunMap | None = None
    rows: list[list[tuple[int | None, Tensor]]] = field(default_factory=list)
    details: list[Tensor | None] = field(default_factory=list)
    left_alone: str = ""
    ratio: float = 0.0
    calls: Counter[tuple[Phase, int]] = field(default_factory=Counter)
    plan_age: int = 0
    shape: SequenceShape | None = None
    sides: str = ""
    num_kept: int = 0

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the tokens of a frame; None where they are no rectangle."""
        if not self.sides:
            return None
        height, width = self.sides.split()
        return int(height), int(width)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is remembered."""
        return num_bytes(*self.details)

    def forget(self) -> None:
        """Drops map and memory; the next step that is not a full one begins anew."""
        self.map = self.base = None
        self.details, self.rows = [], []


@dataclass
class Totals:
    """What happened at one layer in the runs that are over.

    Attributes:
        calls: Steps by phase, by the shape of the sequence and by the image tokens kept.
        plan_age: The most steps that a map had served.
        last: Grid, shape and tokens kept in the last run.
    """

    calls: Counter[tuple[Phase, SequenceShape | None, int]] = field(default_factory=Counter)
    plan_age: int = 0
    last: tuple[tuple[int, int] | None, SequenceShape | None, int] = (None, None, 0)

    def add(self, state: LayerState) -> None:
        """Adds a run that is over, or one that goes on to a copy of these totals."""
        for (phase, num_kept), count in state.calls.items():
            self.calls[phase, state.shape, num_kept] += count
        self.plan_age = max(self.plan_age, state.plan_age)
        if state.shape is not None:
            self.last = state.grid, state.shape, state.num_kept
