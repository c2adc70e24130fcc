"""The two verbs and their choice of form: the Triton kernels where they can run, operators of torch elsewhere.

A model calls these a hundred times per step, so each is one Python frame on a CPU: what could be a helper function
is written out.

Shape names: b batch, N tokens, M slots, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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


def restore(
    outputs: Sequence[Tensor | None],
    slot: Tensor,
    merged: Sequence[int] = (0,),
    base: Tensor | None = None,
    minus: Tensor | None = None,
    plain: Sequence[int] = (),
    details: Sequence[Tensor | None] = (),
    weights: Tensor | None = None,
) -> list[Tensor | None]:
    """Gives what a call on slots gave a row for each token again, and adds what was remembered of each token.

    Computes [base +] (y [- minus])[slot] [+ weights @ detail] for each output y on slots, y [+ weights @ detail] for
    every other. The Triton kernel runs where that of `merge` does, computes in float32 and rounds once; torch's
    operators round after each term.

    Args:
        outputs: What was given; those on slots (b, M, C), floating point, of any strides.
        slot: Row of the flattened (b * M, C) slots of each token, (b * N,) int64, of the token's own batch row.
        merged: The places of the outputs on slots.
        base: What the change of each slot is added to, (b, N, C), such as the tokens before a block.
        minus: What is taken from the slots first, (b, M, C), such as the slots before the block.
        plain: The places of those on slots that have neither `base` nor `minus`.
        details: For each output, what is missed of it and, behind that, its change per step, (1 or 2, b, N, C).
        weights: One and the steps since `details` were taken, (2,) float32 on the device of the outputs; a tensor, so
            that no graph depends on its values.

    Returns:
        Tokens, (b, N, C) each, in the dtypes of `outputs`; those to which nothing is done as they came, all others
        in new memory.

    Raises:
        ValueError: If the Triton kernel is given a tensor of another shape.
    """
    restored = list(outputs)
    for index, y in enumerate(outputs):
        detail = details[index] if details else None
        # Not `in`, which torch.compile takes for false where it has made the places symbols.
        rows = slot if merged.count(index) else None
        if y is None or (rows is None and detail is None):
            continue
        before, off = (None, None) if rows is None or plain.count(index) else (base, minus)
        launched = _launched(y, rows, before, off, detail, weights) if y.is_cuda and _HAS_TRITON else None
        if launched is not None:
            restored[index] = launched
            continue
        out = y
        if rows is not None:
            batch, num_slots, channels = y.shape
            change = y if off is None else y - off
            out = change.reshape(batch * num_slots, channels).index_select(0, rows).view(batch, -1, channels)
            if before is not None:
                out.add_(before)
        if detail is not None and weights is not None:
            if detail.shape[0] == 2 and detail.dtype == weights.dtype and not y.is_cuda:
                # Both terms in one pass over memory; half types have no fast product of this kind on a CPU.
                columns = detail.flatten(1).t()
                if rows is not None:
                    out.view(-1).addmv_(columns, weights)
                else:
                    out = y.reshape(-1).addmv(columns, weights).view(y.shape)
            else:
                missed, *slopes = detail.unbind()
                out = out.add_(missed) if rows is not None else out + missed
                if slopes:
                    out.addcmul_(slopes[0], weights.select(0, 1))
        restored[index] = out
    return restored


def _launched(
    y: Tensor,
    slot: Tensor | None,
    base: Tensor | None,
    minus: Tensor | None,
    detail: Tensor | None,
    weights: Tensor | None,
) -> Tensor | None:
    """What the Triton kernel makes of one output; None where it cannot run."""
    is_recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, base, minus, detail))
    if y.dtype not in _KERNEL_DTYPES or is_recorded:
        return None
    tokens: Tensor
    if type(y) is not Tensor or torch.compiler.is_compiling():
        from gen_turbo.kernels import ops

        tokens = ops.unmerge(y, slot, base, minus, detail, weights)
        return tokens
    launchers = _launchers[y.device.index]
    if launchers is None:
        return None
    with torch.cuda.device(y.device.index):
        tokens = launchers.launch_unmerge(launchers.unmerge_kernel, y, slot, base, minus, detail, weights)
    return tokens
