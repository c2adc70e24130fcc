"""What the stages of an attachment did, counted for its report."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from threading import Lock
from typing import Any

from torch import nn

from gen_turbo.engine.base import LayerReport, NoEffectWarning
from gen_turbo.method import Grid, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.training.layouts import layer_multiplications
from gen_turbo.vlm.images import Images
from gen_turbo.vlm.planning import Schedule
from gen_turbo.vlm.run import Reduction


class Counts:
    """The rows of a report; threads may count at once."""

    def __init__(self) -> None:
        self._rows: dict[str, LayerReport] = {}
        self._lock = Lock()

    @property
    def rows(self) -> list[LayerReport]:
        """One row for each place where tokens leave, in the order of the model."""
        return list(self._rows.values())

    def add(self, name: str, status: str = "reduced") -> None:
        """Adds a row."""
        self._rows[name] = LayerReport(name, 1, status)

    def count(
        self, name: str, before: int, after: int, grid: Grid | None = None, flops: int = 0, stock_flops: int = 0
    ) -> None:
        """Counts one call: the tokens before and after, and the operations that it ran and that stock would have."""
        is_full = before == after
        with self._lock:
            row = self._rows[name]
            self._rows[name] = replace(
                row,
                grid=grid,
                num_tokens=before,
                num_kept=after,
                num_full=row.num_full + is_full,
                num_reduced=row.num_reduced + (not is_full),
                flops=row.flops + flops,
                stock_flops=row.stock_flops + stock_flops,
            )

    def count_words(self, name: str, before: int, after: int, words: int, ratio: float) -> None:
        """Counts tokens of text of which the longest row has so many words; warns where none was to leave."""
        self.count(name, before, after)
        if before == after and num_removed(words, ratio) == 0:
            warnings.warn(
                f"no word was removed from texts of {words} words at text_ratio {ratio}; raise it",
                NoEffectWarning,
                stacklevel=2,
            )

    def add_flops(self, name: str, flops: int) -> None:
        """Counts operations beside those of tokens."""
        with self._lock:
            self._rows[name] = replace(self._rows[name], flops=self._rows[name].flops + flops)


class DecoderCounts:
    """Counts what is removed before decoder layers: one row for the layers from each place on.

    Args:
        counts: Receives the rows.
        schedule: Where tokens leave.
        text: The language model.
        path: Its path.
    """

    def __init__(self, counts: Counts, schedule: Schedule, text: Any, path: str) -> None:
        self._counts, self._schedule = counts, schedule
        firsts, depth = schedule.firsts, text.config.num_hidden_layers
        self._names = {first: f"{path}.layers.{first}" if first else path for first in firsts}
        self._costs: dict[int, tuple[int, int]] = {}
        for first, end in pairwise([*firsts, depth]):
            # The first row has the layers before it too, which save nothing.
            start = 0 if first == firsts[0] else first
            self._costs[first] = token_flops(text, start, end), token_flops(text, first, end)
            counts.add(self._names[first])

    def note(self, first: int, images: Images, reduction: Reduction) -> None:
        """Counts what left before a layer; warns where nothing was to leave at any."""
        wholes = images.wholes or images.lengths
        before, after = sum(wholes), sum(reduction.lengths())
        grid = images.grids[0] if images.grids else None
        columns = images.num_columns or images.is_image_BL.numel()
        cost, saved = self._costs[first]
        # Layers before a cut run on every column.
        flops = columns * cost - (columns - reduction.num_columns) * saved
        self._counts.count(self._names[first], before, after, grid, flops, columns * cost)
        if before == after and first == self._schedule.firsts[-1]:
            _tell_of_no_effect(self._schedule, max(wholes))


def _tell_of_no_effect(schedule: Schedule, longest: int) -> None:
    reducer: TokenReducer = schedule.reducer
    if not reducer.removes or schedule.removes(longest):
        return
    asked = f"keep {reducer.keep}" if reducer.keep is not None else f"ratio {reducer.ratio}"
    more = "lower `keep`" if reducer.keep is not None else "raise `ratio`"
    warnings.warn(
        f"no token was removed from images of {longest} tokens at {asked}; {more}", NoEffectWarning, stacklevel=2
    )


def token_flops(text: nn.Module, first: int = 0, end: int | None = None) -> int:
    """Operations of one token in the decoder layers from the first to the end, without attention between tokens."""
    layers: Any = text.layers
    return 2 * sum(layer_multiplications(layer, text.config) for layer in layers[first:end])
