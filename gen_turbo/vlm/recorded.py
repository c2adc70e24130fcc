"""Recorded states and attentions of a shortened call in the shapes that users of a model expect.

Shape names: B rows, N columns of the call, M of them that ran, H heads, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gen_turbo.vlm.columns import Columns


def whole(output: Any, steps: list[Columns], held: int) -> None:
    """Gives what a language model recorded a row for every token of the call again, in place.

    States (B, M, C) become (B, N, C): a token that left copies the nearest kept one before it. Attentions (B, H, M, M)
    become (B, H, N, N): nothing is paid to a token that left, and it pays what the nearest kept one before it does.

    Args:
        output: Of the language model.
        steps: What left, last first: in the decoder, before its first layer.
        held: Columns that the cache held before; attentions to those stay as they are, in the columns that it holds.
    """
    if not steps:
        return
    output.last_hidden_state = _rows(output.last_hidden_state, steps)
    for name in ("hidden_states", "attentions"):
        recorded = getattr(output, name, None)
        if recorded:
            widened = [_rows(x, steps) if name == "hidden_states" else _square(x, steps, held) for x in recorded]
            setattr(output, name, tuple(widened))


def _rows(x: Tensor, steps: list[Columns]) -> Tensor:
    for columns in steps:
        if x.shape[1] == columns.num_kept:
            x = columns.spread(x)
    return x


def _square(x: Tensor, steps: list[Columns], held: int) -> Tensor:
    for columns in steps:
        if x.shape[2] != columns.num_kept:
            continue
        x = columns.spread(x.transpose(1, 2)).transpose(1, 2)
        if held == 0 and x.shape[3] == columns.num_kept:
            # Padding writes to a spare column behind all others.
            place = columns.index_BM.masked_fill(~columns.valid_BM, columns.num_columns)
            wide = x.new_zeros(*x.shape[:3], columns.num_columns + 1)
            x = wide.scatter(3, place[:, None, None].expand(x.shape), x)[..., :-1]
    return x
