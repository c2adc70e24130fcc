"""What is special about VisToG without training: any ratio, groups near each other."""

from __future__ import annotations

import pytest
import torch

import gen_turbo
from gen_turbo import RandomProcessor, TurboProcessor, VisToGProcessor, attach, report
from tests.engine.families import Keys, family
from tests.snapshots import differences, model_state


def tokens(batch: int = 1, num_tokens: int = 256) -> torch.Tensor:
    """Random tokens, (batch, N, 8)."""
    return torch.randn(batch, num_tokens, 8, generator=torch.Generator().manual_seed(1))


def smooth() -> torch.Tensor:
    """A smooth image of 16 x 16 tokens with one sharp edge."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 3, 16), indexing="ij")
    field = torch.stack([torch.sin(x * k + y) for k in range(1, 9)], -1)
    field[5:12, 3:9] += 2.0
    return field.flatten(0, 1)[None]


def error(processor, x: torch.Tensor) -> float:
    """What merging and copying back loses, by the size of the tokens."""
    plan = processor.plan_tokens(x, grid=(16, 16))
    return ((plan.unmerge(plan.merge(x)) - x).norm() / x.norm()).item()


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.75, 0.9])
def test_groups_are_closer_to_the_tokens_than_random_ones(ratio):
    """Catches grouping that ignores what the tokens hold, at ratios that cells of 2 x 2 do not reach too."""
    assert error(VisToGProcessor(ratio), smooth()) < 0.5 * error(RandomProcessor(ratio), smooth())


def test_groups_are_not_worse_than_turbo_s_merging():
    """Catches a seeding or refinement that makes the dearer plan the coarser one."""
    for ratio in (0.5, 0.75):
        assert error(VisToGProcessor(ratio), smooth()) < 1.05 * error(TurboProcessor(ratio), smooth())


def test_without_a_grid_groups_lie_along_the_line():
    """Catches a square guessed from the number of tokens: equal tokens far along the line must not meet."""
    x = tokens(num_tokens=4).repeat(1, 16, 1)
    plan = VisToGProcessor(0.5, window=3, free=0.0).plan_tokens(x)
    places = [(plan.slot_BN[0] == slot).nonzero()[:, 0] for slot in range(plan.num_slots)]
    assert max(int(place[-1] - place[0]) for place in places) <= 6


def test_shapes_depend_on_size_and_ratio_alone():
    """Catches a number of groups that follows the image, which recompiles a compiled model."""
    flat, busy = torch.ones(1, 255, 8), tokens(num_tokens=255)
    shapes = {VisToGProcessor(0.7).plan_tokens(x, grid=(15, 17)).anchor_BM.shape for x in (flat, busy, 0 * flat)}
    assert shapes == {(1, 255 - 178)}


@pytest.mark.parametrize("name", ["sd15", "pixart-alpha"])
def test_attached_it_shortens_attention_and_leaves_no_trace(name):
    """Catches a plan that the hosts cannot use, an inexact ratio of 0, and leftovers after detaching."""
    model, run = family(name)
    stock, before = run(), model_state(model)
    with attach(model, VisToGProcessor(0.0)):
        assert torch.equal(run(), stock)
    for restore in ("copy", "residual"):
        with attach(model, VisToGProcessor(0.9, restore=restore)), Keys() as keys:
            first, second = run(), run()
            rows = [layer for layer in report(model).layers if layer.status == "reduced"]
        assert torch.equal(first, second) and not torch.equal(first, stock)
        assert rows and all(row.num_kept == row.num_tokens - int(row.num_tokens * 0.9) for row in rows)
        assert {row.num_kept for row in rows} <= {num_keys for _, num_keys in keys.seen}
    assert differences(before, model_state(model)) == []
    assert torch.equal(run(), stock)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 4}, "window must be an odd number of groups such as 3 or 5; got 4"),
        ({"window": -1}, "window must be an odd"),
        ({"num_refinements": -1}, "num_refinements must be 0 to 100; got -1"),
        ({"free": 1.0}, "free must be a share of the groups, 0 <= free < 1; got 1.0"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    """Catches a setting that is taken without a look."""
    with pytest.raises(ValueError, match=words):
        VisToGProcessor(**settings)


def test_the_package_offers_what_exists():
    """Catches a name that is promised and cannot be had, such as a method that is still to come."""
    assert all(getattr(gen_turbo, name) is not None for name in gen_turbo.__all__)
    assert set(gen_turbo._HOME) == set(gen_turbo.__all__) and "VisToGProcessor" in gen_turbo.__all__
