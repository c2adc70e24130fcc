"""What turbo, tome and vistog plan, against plain loops: numbers, tiles, cells, windows and penalties."""

from __future__ import annotations

import math
import random

import oracles
import pytest
import torch

from gen_turbo import ToMeProcessor, TurboProcessor, VisToGProcessor
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.tokens.select import pool_cells

GRIDS = [(4, 4), (8, 8), (12, 20), (17, 5), (1, 30), (36, 36)]
CELL = (2, 2)


def given(grid: tuple[int, int] | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (2, N, 5) and what they mean, (2, N), in float64."""
    num_tokens = 150 if grid is None else math.prod(grid)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_tokens, 5, dtype=torch.float64, generator=generator)
    return x, torch.rand(2, num_tokens, dtype=torch.float64, generator=generator)


def planned(processor, grid, x, value=None, num_plans=0) -> list[list[int]]:
    """The token whose place each token takes."""
    semantic = None if value is None else {"self": value}.__getitem__
    plan = processor.plan(x, LayerInfo("here", processor.ratio, grid, semantic=semantic), StepInfo(7, num_plans))
    return plan.anchor_BM.gather(1, plan.slot_BN).tolist()


WHOLE = {"tile": 0}
OTHERS = [{}, {"value_weight": 1.0}, {"tile": 5, "value_weight": 0.1}, {"semantic": "none"}]


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize(
    ("grid", "settings"),
    [(grid, settings) for grid in [*GRIDS, None] for settings in OTHERS] + [(grid, WHOLE) for grid in GRIDS[:5]],
)
def test_turbo(grid, number, settings):
    """Catches tiles of another size or place, cells of another stride, and a penalty of another weight or of none."""
    rng = random.Random(number)
    processor = TurboProcessor(rng.choice([0.3, 0.5, 0.6]), **settings)
    x, value = given(grid, number)
    num_tokens = x.shape[1]
    corners = [cell[0] for cell in oracles.cells(grid or (1, num_tokens), CELL if grid else (1, 4))]
    if grid is None:
        tile, offset = (1, 64), (0, 0)
    else:
        side = {4: 4, 8: 4, 12: 4, 5: 4, 1: 4, 36: 8}[min(grid)]
        side = min(side, processor.tile) if processor.tile else max(grid)
        tile = side, side
        offset = tuple(side // 2 if number % 2 and processor.tile and length > side else 0 for length in grid)
    candidates = oracles.tile_candidates(grid or (1, num_tokens), tile, offset, corners)
    count = sum(bool(near) for near in candidates.values()) and int(num_tokens * processor.ratio)
    for row, means, own in zip(x, value, planned(processor, grid, x, value, number), strict=True):
        weight = 0.0 if processor.semantic == "none" else processor.value_weight
        penalty = (weight * means / means.mean()).tolist()
        assert own == oracles.match(row.tolist(), candidates, count, penalty)


@pytest.mark.parametrize("grid", [*GRIDS[:4], None])
@pytest.mark.parametrize("is_hashed", [True, False])
def test_tome(grid, is_hashed):
    """Catches cells that are drawn where they should not be, or from another number than the seed and the plan."""
    processor, (x, _) = ToMeProcessor(0.5, is_hashed=is_hashed, seed=3), given(grid, 1)
    num_tokens = x.shape[1]
    cells = oracles.cells(grid or (1, num_tokens), CELL if grid else (1, 4))
    draws = [oracles.drawn(cell[0], 3 * 1_000_003 + 2, len(cell)) if is_hashed and grid else 0 for cell in cells]
    chosen = sorted(cell[draw] for cell, draw in zip(cells, draws, strict=True))
    side = max(grid) if grid else 64
    candidates = oracles.tile_candidates(grid or (1, num_tokens), (side, side), (0, 0), chosen)
    for row, own in zip(x, planned(processor, grid, x, num_plans=2), strict=True):
        assert own == oracles.match(row.tolist(), candidates, int(num_tokens * 0.5), [0.0] * num_tokens)


@pytest.mark.parametrize("grid", [*GRIDS[:5], None])
@pytest.mark.parametrize(
    "settings", [{}, {"window": 1}, {"window": 3, "num_refinements": 0}, {"free": 0.0, "num_refinements": 2}]
)
def test_vistog(grid, settings):
    """Catches free groups of another share, and a window or refinements that are not those that were set."""
    processor, (x, _) = VisToGProcessor(**settings), given(grid, 2)
    num_tokens = x.shape[1]
    num_groups = num_tokens - math.floor(num_tokens * 7 / 10)
    cells = pool_cells(grid or (1, num_tokens), num_groups - math.floor(num_groups * processor.free))
    allowed = oracles.windows(grid or (1, num_tokens), cells.slot_BN[0].tolist(), processor.window)
    for row, own in zip(x, planned(processor, grid, x), strict=True):
        seeds = cells.anchor_BM[0].tolist()
        assert own == oracles.group(row.tolist(), seeds, allowed, num_groups, processor.num_refinements)


def test_defaults():
    """Catches a default that is another one than the documentation says."""
    turbo, tome, vistog = TurboProcessor(), ToMeProcessor(), VisToGProcessor()
    assert (turbo.ratio, turbo.semantic, turbo.value_weight, turbo.tile) == (0.7, "self", 0.002, 8)
    assert (tome.ratio, tome.restore, tome.match_every, tome.is_hashed, tome.seed) == (0.5, "copy", 1, True, 0)
    assert (vistog.ratio, vistog.window, vistog.num_refinements, vistog.free) == (0.7, 5, 1, 0.25)
    assert (turbo.map_period, tome.map_period, vistog.map_period) == (2, 0, 1)
    assert turbo.max_ratio == tome.max_ratio == 0.75 and vistog.max_ratio == 1
    TurboProcessor(tile=2, value_weight=0.0), VisToGProcessor(free=0.0, window=1, num_refinements=0)
