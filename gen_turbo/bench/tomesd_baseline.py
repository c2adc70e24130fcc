"""The published package tomesd, made comparable: its matching as functions and as a plan, its patch undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.token_map import TokenMap

try:
    import tomesd
    from tomesd.merge import bipartite_soft_matching_random2d
except ImportError as error:
    raise ImportError("this comparison needs the package tomesd; run: pip install 'gen_turbo[baselines]'") from error

Grid = tuple[int, int]
Verb = Callable[[Tensor], Tensor]


def matching(tokens_BNC: Tensor, grid: Grid, num_removed: int) -> tuple[Verb, Verb]:
    """Gives tomesd's own merge and unmerge for (height, width) tokens, with fixed destinations."""
    height, width = grid
    merge, unmerge = bipartite_soft_matching_random2d(tokens_BNC, width, height, 2, 2, num_removed, no_rand=True)
    return merge, unmerge


def same_plan(unmerge: Verb, batch: int, grid: Grid, num_removed: int) -> tuple[TokenMap, Tensor]:
    """Reads the plan out of tomesd's unmerge.

    Returns:
        The plan that merges the same tokens, and for each of its slots the row (B, M) that tomesd gives it.
    """
    num_tokens = grid[0] * grid[1]
    num_slots = num_tokens - num_removed
    row_BM = torch.arange(num_slots, dtype=torch.float64).expand(batch, -1)
    row_BN = unmerge(row_BM[..., None])[..., 0].long()
    # Any member names a row; where a row has a destination, the destination does.
    token_N = torch.arange(num_tokens)
    owner_BM = torch.zeros(batch, num_slots, dtype=torch.int64).scatter(1, row_BN, token_N.expand(batch, -1))
    destinations_D = grid_destinations(grid)
    owner_BM = owner_BM.scatter(1, row_BN[:, destinations_D], destinations_D.expand(batch, -1))
    plan = TokenMap.from_destinations(owner_BM.gather(1, row_BN))
    return plan, row_BN.gather(1, plan.anchor_BM)


@contextmanager
def patched(model: nn.Module, ratio: float, max_downsample: int = 1, is_whole: bool = False) -> Iterator[None]:
    """Merges by tomesd inside the `with` block; afterwards the model is as it was."""
    whole = {"merge_crossattn": is_whole, "merge_mlp": is_whole}
    tomesd.apply_patch(model, ratio=ratio, max_downsample=max_downsample, **whole)
    try:
        yield
    finally:
        tomesd.remove_patch(model)
        for module in model.modules():
            module.__dict__.pop("_tome_info", None)
