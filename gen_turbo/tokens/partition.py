"""Who may be a destination: one token per grid cell, one per run of a line.

Shape names: D destinations.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_SEED_FACTOR = 0x9E3779B1
_ROUNDS = ((16, 0x7FEB352D), (15, 0x2C1B3C6D))


def grid_destinations(
    grid: tuple[int, int],
    stride: tuple[int, int] = (2, 2),
    variant: str | int = "corner",
) -> Tensor:
    """Picks one destination in every cell of a grid of tokens in raster order.

    After ToMe for Stable Diffusion (Bolya and Hoffman, 2023, arXiv 2303.17604, Section 4), on any rectangle: a
    cell cut off by the lower or right edge has its destination among the tokens it does have.

    Args:
        grid: (height, width) in tokens.
        stride: (height, width) of a cell in tokens.
        variant: "corner" for the upper left token of each cell, or an integer seed for one picked by a hash of
            the seed and the cell's place: the same in every process, and no random state is touched.

    Returns:
        Token indices, (D,) int64, ascending, on the CPU.

    Raises:
        ValueError: If the grid or the stride is not positive, or the variant is another string.

    Differs from the paper: the random choice is a hash, so one seed always gives one image.
    """
    (height, width), (cell_height, cell_width) = grid, stride
    if min(height, width, cell_height, cell_width) < 1:
        raise ValueError(f"grid {grid} and stride {stride} must be positive (height, width) pairs in tokens")
    top = torch.arange(0, height, cell_height, device="cpu")[:, None]
    left = torch.arange(0, width, cell_width, device="cpu")[None, :]
    if variant == "corner":
        return (top * width + left).reshape(-1)
    if isinstance(variant, str):
        raise ValueError(f"unknown variant {variant!r}; use 'corner' or an integer seed")
    rows = (height - top).clamp(max=cell_height)
    columns = (width - left).clamp(max=cell_width)
    member = hash_cells(top * width + left, variant) % (rows * columns)
    tokens = (top + member // columns) * width + left + member % columns
    return tokens.reshape(-1).sort().values


def hash_cells(cell: Tensor, seed: int) -> Tensor:
    """Mixes a seed into int64 cell numbers, evenly over [0, 2 ** 32): the same on every device and in every process.

    Two multiply-and-shift rounds on 32 bits kept in int64, so that no product overflows.
    """
    state = (cell + (seed * _SEED_FACTOR & _MASK)) & _MASK
    for shift, factor in _ROUNDS:
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return state ^ (state >> 16)
