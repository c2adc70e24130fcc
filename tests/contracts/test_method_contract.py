"""What every registered method must keep; a new file in gen_turbo/methods is tested without an edit here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gen_turbo.methods  # noqa: F401  registers the methods
from gen_turbo import RandomProcessor, TurboProcessor, VisToGProcessor
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.methods.vscan import VScanProcessor
from gen_turbo.registry import METHODS

NAMES = METHODS.names()
# Methods that cannot plan from tokens alone say what else they read.
PLANNERS = [name for name in NAMES if not getattr(METHODS[name], "needs", ())]
GRIDS = [(8, 8), (6, 10), (7, 9), None]


def tokens(num_tokens: int, batch: int = 2) -> torch.Tensor:
    """Random tokens, (batch, N, 8)."""
    return torch.randn(batch, num_tokens, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_constructible_without_arguments_and_by_position(name):
    """Catches a field without a default, or one that comes before `ratio`."""
    assert METHODS[name]().ratio > 0
    assert METHODS[name](0.25).ratio == 0.25


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_exactly_the_ratio_leaves(name, grid, ratio):
    """Catches rounding of its own, cells that do not fit odd grids, and a missing fallback without a grid."""
    num_tokens = grid[0] * grid[1] if grid else 64
    plan = METHODS[name](ratio).plan_tokens(tokens(num_tokens), grid=grid)
    removed = 0 if name == "identity" else int(num_tokens * ratio)
    assert plan.num_slots == num_tokens - removed
    assert torch.equal(plan.slot_BN.gather(1, plan.anchor_BM), torch.arange(plan.num_slots).expand_as(plan.anchor_BM))
    assert plan.sizes().sum(1).tolist() == [num_tokens] * plan.slot_BN.shape[0]


@pytest.mark.parametrize("name", PLANNERS)
def test_same_input_same_plan_and_no_global_randomness(name):
    """Catches a draw from the global generator and state that is kept between calls."""
    processor, x = METHODS[name](0.5), tokens(64)
    before = torch.get_rng_state()
    first = processor.plan_tokens(x, grid=(8, 8))
    processor.plan_tokens(tokens(100), grid=(10, 10))
    torch.manual_seed(1)
    second = METHODS[name](0.5).plan_tokens(x, grid=(8, 8))
    torch.set_rng_state(before)
    assert torch.equal(first.slot_BN, second.slot_BN) and torch.equal(first.anchor_BM, second.anchor_BM)


# Controls, and a baseline that does not look at the tokens.
@pytest.mark.parametrize("name", sorted(set(PLANNERS) - {"random", "identity", "stride"}))
def test_better_than_random_on_smooth_tokens(name):
    """Catches a method that chooses no better than the control: its error must be below two thirds of it."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 3, 16), indexing="ij")
    smooth = torch.stack([torch.sin(x * k + y) for k in range(1, 9)], -1).flatten(0, 1)[None]

    def error(method: str) -> float:
        plan = METHODS[method](0.5).plan_tokens(smooth, grid=(16, 16))
        return (plan.unmerge(plan.merge(smooth)) - smooth).norm().item()

    assert error(name) < 2 / 3 * error("random")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 1.2}, r"ratio must be the fraction of tokens to remove.*got 1.2"),
        ({"ratio": -0.1}, "ratio must be"),
        ({"ratios": {1: 2.0}}, r"ratios\[1\] must be"),
        ({"layer_ratios": {"a": 2.0}}, r"layer_ratios\['a'\] must be"),
        ({"ratio": 0.5, "step_scale": {3: 2.0}}, r"ratio times step_scale\[3\] must be .*; got 0.5 \* 2.0 = 1"),
        ({"step_scale": {0: -1.0}}, "step_scale must give factors >= 0 by step >= 0; got 0: -1.0"),
        ({"merge_span": 0}, "merge_span=0 is of whole blocks; use scope='block'"),
        ({"scope": "block", "merge_span": -1}, "merge_span must be at least 0; got -1"),
        ({"restore": "magic"}, "restore must be 'residual', 'copy' or 'auto'; got 'magic'"),
        ({"full_every": 1}, "full_every must be at least 2; got 1"),
        ({"extrapolation_order": 2}, "order must be 0"),
        ({"memory_limit_mb": -1.0}, "memory_limit_mb must not be negative"),
    ],
)
def test_wrong_settings_are_named(name, settings, words):
    """Catches a setting that is clipped in silence."""
    with pytest.raises(ValueError, match=words):
        METHODS[name](**settings)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name]().max_ratio < 1])
def test_a_ratio_beyond_the_cells_is_an_error(name):
    """Catches the silent cap at 0.75 of which users of other packages complain."""
    with pytest.raises(ValueError, match=r"<= 0.75; got 0.8"):
        METHODS[name](0.8).plan_tokens(tokens(64), grid=(8, 8))


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_grid_is_named(name):
    """Catches guessing the grid from the number of tokens."""
    with pytest.raises(ValueError, match="a grid of 8 x 9 does not hold 64 tokens"):
        METHODS[name]().plan_tokens(tokens(64), grid=(8, 9))


ODD_KINDS = {
    "a text for a number": (lambda: TurboProcessor(ratio="0.5"), "ratio must be a number"),
    "a truth for a number": (lambda: EAdaPruneProcessor(energy=True), "energy must be a number"),
    "a fraction of a token": (lambda: TurboProcessor(keep=2.5), "keep must be a whole number"),
    "a fraction of a layer": (lambda: VScanProcessor(cut=1.5), "cut must be a whole number"),
    "a truth in a list": (lambda: PyramidDropProcessor(cuts=[True]), "cuts must be a whole number"),
    "no list": (lambda: PyramidDropProcessor(cuts=3), "cuts must be a list"),
    "a text for a truth": (lambda: TurboProcessor(adaptive="no"), "adaptive must be true or false"),
    "a number for a text": (lambda: TurboProcessor(restore=1), "restore must be a text"),
    "a window of all memory": (lambda: VisToGProcessor(window=10**9 + 1), "window must be at most 31"),
    "refinements without end": (lambda: VisToGProcessor(num_refinements=10**9), "num_refinements must be 0 to 100"),
    "a seed that no generator takes": (lambda: RandomProcessor(seed=10**20), "seed must be at most"),
    "None": (lambda: PyramidDropProcessor(cuts=None), "cuts must be a list"),
}


@pytest.mark.parametrize(("make", "message"), ODD_KINDS.values(), ids=ODD_KINDS)
def test_settings_are_of_their_kind(make, message):
    """Catches a text that is true whatever it says, a fraction of a token, and errors of Python's in attach."""
    with pytest.raises(ValueError, match=message):
        make()
    whole = TurboProcessor(ratio=0, keep=np.int64(3), value_weight=np.float32(0.5), layer_ratios={"a": 0})
    assert whole.keep == 3
