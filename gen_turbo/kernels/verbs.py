"""The two verbs and their choice of form: the Triton kernels where they can run, operators of torch elsewhere.

A model calls these a hundred times per step, so each is one Python frame on a CPU: what could be a helper function
is written out.

Shape names: b batch, N tokens, M slots, C channels.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Launchers(dict[int, Any]):
    """The module of launchers for each GPU; None where Triton fails, as it does without a C compiler."""

    def __missing__(self, index: int) -> Any:
        """Imports the launchers and tries one on a single token, before the first real call on this GPU."""
        launchers = None
        try:
            from gen_turbo.kernels import merge_triton

            with torch.cuda.device(index):
                x, order = torch.zeros(1, 1, 64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
                merge_triton.launch_merge(merge_triton.merge_kernel, x, order, torch.arange(2, device="cuda"))
            launchers = merge_triton
        except Exception as error:  # Compilers fail in as many ways as there are machines.
            warnings.warn(f"Triton does not run on GPU {index}, so torch does its work slower: {error}", stacklevel=3)
        return self.setdefault(index, launchers)


_launchers = _Launchers()


def merge(x: Tensor, order: Tensor, offsets: Tensor, share: Tensor) -> Tensor:
    """Averages the tokens of each slot.

    The Triton kernel runs on a GPU, in float16, bfloat16 and float32, where no gradient is recorded; it sums in
    float32. Its first call compiles, so call once before capturing a CUDA graph.

    Args:
        x: Tokens, (b, N, C), floating point, of any strides.
        order: Rows of the flattened (b * N, C) tokens sorted by slot, (b * N,) int64. The tokens of a slot are of
            its own batch row.
        offsets: Where in `order` each slot begins, and the end, (b * M + 1,) int64. An empty slot gives zeros.
        share: One over the size of the slot of each entry of `order`, (b * N,), in the dtype to sum in: float32, or
            float64 for float64 tokens. The kernel counts for itself.

    Returns:
        Slots, (b, M, C), in the dtype of `x`.

    Raises:
        ValueError: If `order` is for another number of tokens.
    """
    batch, length, channels = x.shape
    if order.numel() != batch * length:
        raise ValueError(f"order has {order.numel()} entries for {batch} x {length} tokens; make a map for this size")
    slots: Tensor
    if x.is_cuda and _HAS_TRITON and x.dtype in _KERNEL_DTYPES and not (torch.is_grad_enabled() and x.requires_grad):
        if type(x) is not Tensor or torch.compiler.is_compiling():
            from gen_turbo.kernels import ops

            slots = ops.merge(x, order, offsets)
            return slots
        launchers = _launchers[x.device.index]
        if launchers is not None:
            with torch.cuda.device(x.device.index):
                slots = launchers.launch_merge(launchers.merge_kernel, x, order, offsets)
            return slots
    rows = x.reshape(batch * length, channels)
    if x.dtype == share.dtype:
        # Measurably faster than mode "mean" and index_add_.
        slots = torch.embedding_bag(rows, order, offsets, False, 0, False, share, True)[0]
    elif x.is_cuda:
        # The mean of half types on CUDA sums in float32; a sum would take `share` in half precision.
        slots = torch.embedding_bag(rows, order, offsets, False, 1, False, None, True)[0]
    else:
        slots = torch.embedding_bag(rows.to(share.dtype), order, offsets, False, 0, False, share, True)[0].to(x.dtype)
    return slots.view(batch, -1, channels)


def unmerge(
    y: Tensor,
    slot: Tensor,
    base: Tensor | None = None,
    minus: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
    gap: Tensor | None = None,
) -> Tensor:
    """Copies each slot to all of its tokens and adds what belongs to each token: base + (y - minus)[slot] + ...

    Computes [base +] (y [- minus])[slot] [+ residual [+ slope * gap]]. The Triton kernel runs where that of `merge`
    does, computes in float32 and rounds once; torch's operators round after each term.

    Args:
        y: Slots, (b, M, C), floating point, of any strides.
        slot: Row of the flattened (b * M, C) slots of each token, (b * N,) int64, of the token's own batch row.
        base: What the change of each slot is added to, (b, N, C), such as the tokens before a block.
        minus: What is taken from the slots first, (b, M, C), such as the slots before the block.
        residual: Detail of each token that its slot misses, (b, N, C).
        slope: Change of the residual per step, (b, N, C). Only with `residual` and `gap`.
        gap: Steps since the residual was taken, float32 of no dimension, on the device of `y`; a tensor, so that no
            graph depends on its value.

    Returns:
        Tokens, (b, N, C), in the dtype of `y`; new memory.

    Raises:
        ValueError: If the Triton kernel is given a tensor of another shape.
    """
    batch, num_slots, channels = y.shape
    if y.is_cuda and _HAS_TRITON and y.dtype in _KERNEL_DTYPES:
        added = (y, base, minus, residual, slope)
        if not (torch.is_grad_enabled() and any(term is not None and term.requires_grad for term in added)):
            tokens: Tensor
            if type(y) is not Tensor or torch.compiler.is_compiling():
                from gen_turbo.kernels import ops

                tokens = ops.unmerge(y, slot, base, minus, residual, slope, gap)
                return tokens
            launchers = _launchers[y.device.index]
            if launchers is not None:
                with torch.cuda.device(y.device.index):
                    kernel = launchers.unmerge_kernel
                    tokens = launchers.launch_unmerge(kernel, y, slot, base, minus, residual, slope, gap)
                return tokens
    change = y if minus is None else y - minus
    out = change.reshape(batch * num_slots, channels).index_select(0, slot).view(batch, -1, channels)
    if base is not None:
        out.add_(base)
    if residual is not None:
        out.add_(residual)
        if slope is not None and gap is not None:
            out.addcmul_(slope, gap)
    return out
