"""Small tables of numbers that plans are made with, kept by shape so that no call makes them again.

Shape names: B rows, N numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps what a function of a shape and a device makes; compiled code and CUDA graphs make it in their graph."""
    # Tables made in inference mode would serve no training.
    kept = lru_cache(maxsize=256)(torch.inference_mode(False)(make))

    @wraps(make)
    def table(*of: Any) -> Tensor:
        return make(*of) if torch.compiler.is_compiling() or is_capturing() else kept(*of)

    return table


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: what it reads later must stay where it is, so it keeps its own."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@_kept
def counting(batch: int, length: int, device: torch.device) -> Tensor:
    """0, 1, 2 and so on in every row: (B, N) int64."""
    return torch.arange(length, device=device).repeat(batch, 1)


@_kept
def ranks(batch: int, length: int, device: torch.device) -> Tensor:
    """0 and then ones in every row: (B, N) int64."""
    return (torch.arange(length, device=device) > 0).long().repeat(batch, 1)


@_kept
def row_starts(batch: int, length: int, device: torch.device) -> Tensor:
    """Where rows of a length begin when they stand behind each other: (B, 1) int64."""
    return torch.arange(batch, device=device)[:, None] * length


@_kept
def filled(batch: int, length: int, value: float, device: torch.device) -> Tensor:
    """One number everywhere: (B, N) float32."""
    return torch.full((batch, length), value, dtype=torch.float32, device=device)


def stacked(index: Tensor, length: int) -> Tensor:
    """Indices into rows of a length, (B, n), as indices into all rows behind each other, of the same shape."""
    return index if len(index) == 1 else index + row_starts(len(index), length, index.device)
