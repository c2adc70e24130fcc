"""A run whose batch shrinks to one guidance branch, as callbacks that end guidance do, goes on where that branch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gen_turbo.engine.context import Context
from gen_turbo.engine.run_map import RunMap
from gen_turbo.engine.state import LayerState


def go_on(context: Context, others: Sequence[Context]) -> Context | None:
    """Gives a new context what another one of its run remembers of the same rows; the samples of a batch are apart.

    That is so where its conditioning is a part of the other one's, whose next call it makes, and as many text tokens
    are left. It waits for the device to compare values.

    Args:
        context: Just entered.
        others: Those that it may be a branch of.

    Returns:
        The context that it goes on for; None where it begins anew.
    """
    for whole in others:
        rows = _rows_in(context, whole)
        if rows is not None and _has_same_text(context, whole, rows) and _fits(context, whole):
            _take_over(context, whole, rows)
            return whole
    return None


def _rows_in(context: Context, whole: Context) -> slice | None:
    """The rows of a batch that are those of a smaller one; the last where several are, which pipelines go on with."""
    here, there = context.conditioning, whole.conditioning
    num, batch = context.layout.shape[0], whole.layout.shape[0]
    is_part = whole.run is context.run and num < batch and batch % num == 0
    is_alike = context.layout == whole.layout._replace(shape=context.layout.shape) and (
        context.layout.shape[1:] == whole.layout.shape[1:]
    )
    is_next = context.index is not None and whole.index is not None and context.index == whole.index + 1
    if not (is_part and is_alike and is_next) or here is None or there is None:
        return None
    if len(here) != num or len(there) != batch:
        return None
    parts = (slice(first, first + num) for first in range(batch - num, -1, -num))
    return next((rows for rows in parts if torch.equal(there[rows], here)), None)


def _has_same_text(context: Context, whole: Context, rows: slice) -> bool:
    """Whether as much was merged of the text alone as of the same rows in the batch, and nothing of it is cached."""
    is_cached = context.text_source is not None or whole.text_source is not None
    counts = [(of.num_text, of.num_merged_text) for of in (context, whole)]
    if is_cached or counts[0] != counts[1]:
        return False
    sizes, before = (of.text.sizes if of.text is not None else None for of in (context, whole))
    if sizes is None or before is None:
        return sizes is before
    return torch.equal(sizes, before if len(before) == 1 else before[rows])


def _fits(context: Context, whole: Context) -> bool:
    """Whether the sequences differ in nothing but the number of samples."""
    num, batch = context.layout.shape[0], whole.layout.shape[0]
    states = [state for state in whole.states.values() if state.map is not None]
    return (
        context.geometry.num_images in (0, num)
        and replace(context.geometry, num_images=whole.geometry.num_images) == whole.geometry
        and all(state.shape is not None and state.shape.batch == batch for state in states)
        and all(detail is None or detail.shape[1] == batch for state in states for detail in state.details)
    )


def _take_over(context: Context, whole: Context, rows: slice) -> None:
    context.step = whole.step + 1
    ids: dict[object, int] = {id(None): id(None)}
    for group, known in zip(context.groups, whole.groups, strict=True):
        group.last, group.ratio = known.last, known.ratio
        ids[id(known.weights)] = id(group.weights)
    num, maps = context.layout.shape[0], context.maps
    context.maps, made = {}, dict[int, RunMap]()
    for (stream, grid, length, _, ratio, owner), base in whole.maps.items():
        key, value = (stream, grid, length, num, ratio, ids[owner]), base.part(rows)
        part = maps.get(key)
        if part is None:
            part = RunMap(value, num, base.dtype, owner=base.owner)
        else:
            part.write(value)
        part.made_at, part.num_maps = base.made_at, base.num_maps
        context.maps[key] = made[id(base)] = part
    # Blocks of a span have one state.
    pairs = {id(before): (context.states[layer], before) for layer, before in whole.states.items()}
    for state, before in pairs.values():
        _fill(state, before, made, rows)
    context.residual_bytes = sum(state.num_bytes for state, _ in pairs.values())


def _fill(state: LayerState, before: LayerState, made: dict[int, RunMap], rows: slice) -> None:
    """Writes the part of what a layer remembers into its buffers, if there are such."""
    num, batch = rows.stop - rows.start, before.shape.batch if before.shape is not None else 0
    state.left_alone, state.ratio, state.sides = before.left_alone, before.ratio, before.sides
    state.num_kept = before.num_kept
    state.shape = before.shape and before.shape._replace(batch=num)
    if before.map is None or before.base is None:
        state.forget()
        return
    base = state.base = made[id(before.base)]
    state.map = base.widened(before.map.leading, before.map.trailing)
    places = {id(taken): place for place, taken in before.base.taken.items()}
    state.rows = []
    for items in before.rows:
        found = [(item, places[id(taken)]) for item, taken in items]
        state.rows.append([(item, base.rows_at(a, b, num if n == batch else n)) for item, (a, b, n) in found])
    held = state.details or [None] * len(before.details)
    details = [None if detail is None else detail[:, rows] for detail in before.details]
    state.details = [
        None if new is None else old.copy_(new) if old is not None else new.clone()
        for old, new in zip(held, details, strict=True)
    ]
