"""The Triton kernels and their launchers; this module is imported on the first call on a GPU.

A program of either kernel handles a tile of ROWS rows by BLOCK channels and one batch row. Strides are passed, so
that a part of a longer sequence is read in place: row r of the flattened tokens of batch row i lies at
r * stride + i * shift, where shift is 0 for a contiguous tensor.

A launch costs 17 Python frames, nearly all of them Triton's (the binder, the cache key, the launcher); through the
operators of `ops` it costs 43 and three times the host time, which is why only tracing goes there. A CUDA graph or
compiled code pays neither.
"""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

# Rows that a program has in flight at a time; most slots are smaller.
_ROWS = 4


# What the kernels name must be known wherever inductor copies their source: tl, and nothing of this module.
@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(
    x: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    shift: tl.tensor,
    channels: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Averages the rows of one slot; the grid is (slots per batch row, batch, channel blocks)."""
    batch = tl.program_id(1).to(tl.int64)
    slot = batch * tl.num_programs(0) + tl.program_id(0)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + slot)
    end = tl.load(offsets + slot + 1)
    x += batch * shift
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(begin, end, ROWS):
        entry = first + tl.arange(0, ROWS)
        row = tl.load(order + entry, mask=entry < end, other=0)
        mask = (entry < end)[:, None] & (channel < channels)[None, :]
        total += tl.load(x + row[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) * (1.0 / tl.maximum(end - begin, 1).to(tl.float32))
    tl.store(out + slot * channels + channel, mean.to(out.dtype.element_ty), mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def unmerge_kernel(
    y: tl.tensor,
    slot: tl.tensor,
    base: tl.tensor,
    minus: tl.tensor,
    detail: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    y_stride: tl.tensor,
    y_shift: tl.tensor,
    base_stride: tl.tensor,
    base_shift: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    extent: tl.tensor,
    HAS_SLOT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Restores ROWS tokens; the grid is (blocks of tokens, batch, channel blocks). Unused pointers are never read."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = batch * length + token
    source = (tl.load(slot + row, mask=token < length, other=0) if HAS_SLOT else row)[:, None]
    mask = (token < length)[:, None] & (channel < channels)
    at = row[:, None] * channels + channel
    value = tl.load(y + batch * y_shift + source * y_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_MINUS:
        value -= tl.load(minus + source * channels + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_BASE:
        place = base + batch * base_shift + row[:, None] * base_stride + channel
        value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if TERMS > 0:
        value += tl.load(detail + at, mask=mask, other=0.0).to(tl.float32)
    if TERMS > 1:
        value += tl.load(detail + extent + at, mask=mask, other=0.0).to(tl.float32) * tl.load(weights + 1)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def launch_merge(kernel: Any, x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Launches `merge_kernel`, plain or wrapped for tracing, on the current device; arguments as in `verbs.merge`."""
    batch, length, channels = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    stride, num_slots = x.stride(1), (offsets.shape[0] - 1) // batch
    out = x.new_empty(batch, num_slots, channels)
    block = _block(channels)
    kernel[(num_slots, batch, -(-channels // block))](
        x,
        order,
        offsets,
        out,
        stride,
        x.stride(0) - length * stride,
        channels,
        BLOCK=block,
        ROWS=_ROWS,
        num_warps=block // 256,
    )
    return out


def launch_unmerge(
    kernel: Any,
    y: Tensor,
    slot: Tensor | None,
    base: Tensor | None,
    minus: Tensor | None,
    detail: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Launches `unmerge_kernel`, plain or wrapped for tracing, on the current device; arguments as `verbs.restore`.

    Without `slot` every row of `y` is a token.
    """
    batch, length, channels = y.shape
    if slot is not None:
        length = slot.shape[0] // batch
    out = y.new_empty(batch, length, channels)
    several = None if detail is None else (detail.shape[0], *out.shape)
    for term, shape in ((base, out.shape), (minus, y.shape), (detail, several)):
        if term is not None and term.shape != shape:
            raise ValueError(f"got a term of shape {tuple(term.shape)} where {tuple(shape or ())} is needed")
    if y.stride(2) != 1:
        y = y.contiguous()
    # A pointer that is not read still needs a tensor.
    onto = y if base is None else base if base.stride(2) == 1 else base.contiguous()
    y_stride, base_stride = y.stride(1), onto.stride(1)
    block = _block(channels)
    kernel[(-(-length // _ROWS), batch, -(-channels // block))](
        y,
        y if slot is None else slot,
        onto,
        y if minus is None else minus.contiguous(),
        y if detail is None else detail.contiguous(),
        y if weights is None else weights,
        out,
        y_stride,
        y.stride(0) - y.shape[1] * y_stride,
        base_stride,
        onto.stride(0) - length * base_stride,
        length,
        channels,
        batch * length * channels,
        HAS_SLOT=slot is not None,
        HAS_BASE=base is not None,
        HAS_MINUS=minus is not None,
        TERMS=0 if detail is None else detail.shape[0],
        BLOCK=block,
        ROWS=_ROWS,
        num_warps=block // 256,
    )
    return out


def _block(channels: int) -> int:
    """Channels of a program: a vector of 16 bytes of a half type per thread; warps beyond the last do nothing."""
    return 1024 if channels > 512 else 512 if channels > 256 else 256
