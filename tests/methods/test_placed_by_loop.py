"""What methods that pool, stride, resize, draw or match plan, against plain loops."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.pool import PoolProcessor
from gen_turbo.methods.random import RandomProcessor
from gen_turbo.methods.resize import ResizeProcessor
from gen_turbo.methods.stride import StrideProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from tests.methods.loops import RATIOS, Values, join_nearest, left, planned, tokens, value


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", [PoolProcessor, VisToGVisionProcessor])
def test_pooled_cells(method, ratio):
    """Catches cells that are no rectangles of the grid, of another number, and a line cut into rows."""
    x = tokens(48)
    for grid in [(6, 8), (8, 6), None]:
        plan = method(ratio).plan(x, LayerInfo("pre_llm", ratio, grid), StepInfo())
        boxes = oracles.pool_cells(grid or (1, 48), plan.slot_BN[0].tolist())
        assert len(boxes) == left(48, ratio) and len(plan.slot_BN) == 1
        sides = [(bottom - top, right - left) for top, bottom, left, right in boxes]
        areas = [height * width for height, width in sides]
        assert grid is None or ratio == 0.999 or max(areas) <= 2 * 48 / len(boxes)
        assert grid is None or ratio != 0.5 or max(max(side) for side in sides) <= 2


@pytest.mark.parametrize("ratio", RATIOS)
def test_strides(ratio):
    """Catches places that lean to one end, and another number of them."""
    x, kept = tokens(20), left(20, ratio)
    [own] = planned(StrideProcessor(ratio), x)
    places = [math.floor((place + 0.5) * 20 / kept) for place in range(kept)]
    assert own == join_nearest(places, 20)


@pytest.mark.parametrize(("grid", "smaller"), [((8, 8), (5, 5)), ((6, 9), (4, 6)), ((1, 20), (1, 10))])
def test_resize(grid, smaller):
    """Catches the image made larger, turned or of another shape, and tokens of another cell."""
    ratio = 0.5
    [own] = planned(ResizeProcessor(ratio), tokens(math.prod(grid)), grid=grid, name="input")
    cell = [
        [math.floor((place + 0.5) * few / many) for place in range(many)]
        for many, few in zip(grid, smaller, strict=True)
    ]
    middle = [
        [math.floor((place + 0.5) * many / few) for place in range(few)]
        for many, few in zip(grid, smaller, strict=True)
    ]
    expected = [middle[0][row] * grid[1] + middle[1][column] for row in cell[0] for column in cell[1]]
    assert own == expected
    for name, where in [("pre_llm", grid), ("input", None)]:
        with pytest.raises(ValueError, match="images smaller, which are not here; use pool"):
            planned(ResizeProcessor(ratio), tokens(math.prod(grid)), grid=where, name=name)


@pytest.mark.parametrize("ratio", RATIOS)
def test_random_draws(ratio):
    """Catches a draw that another release changes, one that forgets seed or step, and tokens that join leaving ones."""
    x = tokens(20)
    draws = {}
    for seed, step in [(0, 0), (0, 1), (1, 0), (-1, 5), (2**31 - 1, 0)]:
        [own] = planned(RandomProcessor(ratio, seed=seed), x, frame=StepInfo(step))
        draws[seed, step] = own
        assert {own[n] for n in own} == set(own) and len(set(own)) == left(20, ratio)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        order = torch.randperm(20, generator=generator).tolist()
        removed = 20 - left(20, ratio)
        choice = torch.randint(20 - removed, (removed,), generator=generator).tolist()
        assert {n: own[n] for n in order[:removed]} == {
            n: order[removed:][to] for n, to in zip(order[:removed], choice, strict=True)
        }
    assert ratio == 0.1 or len({tuple(own) for own in draws.values()}) == len(draws)
    with pytest.raises(ValueError, match="seed must be at most"):
        RandomProcessor(seed=-(2**31))


def turbo_vit(rows: list[list[float]], values: list[float] | None, weight, num_removed: int) -> list[int]:
    """The token whose place each takes: odd places leave into even ones, again and again until enough have left."""
    own, here = list(range(len(rows))), list(range(len(rows)))
    size, rows = [1] * len(rows), [list(row) for row in rows]
    values = None if values is None else list(values)
    while num_removed:
        even = here[::2]
        scored = []
        mean = sum(values[n] for n in here) / len(here) if values else 1.0
        for n in here[1::2]:
            alike = [oracles.cosine(rows[n], rows[other]) for other in even]
            scored.append((weight(values[n], mean) - max(alike) if values else -max(alike), n, alike.index(max(alike))))
        now = min(num_removed, len(here) // 2)
        merged: dict[int, list[int]] = {}
        for _, n, place in sorted(scored)[:now]:
            merged.setdefault(even[place], []).append(n)
        for other, members in merged.items():
            every = [other, *members]
            total = sum(size[n] for n in every)
            rows[other] = [sum(size[n] * rows[n][c] for n in every) / total for c in range(len(rows[other]))]
            if values:
                values[other] = sum(size[n] * values[n] for n in every) / total
            size[other] = total
            own = [other if taken in members else taken for taken in own]
            here = [n for n in here if n not in members]
        num_removed -= now
    return own


PAPER = {"alpha": 0.02, "scale": 30.0, "beta": 0.5, "gamma": 2}
VIT = [
    ({"semantic": "none"}, None),
    ({"value_weight": 0.0}, lambda value, mean: 0.0),
    ({}, lambda value, mean: 0.26 * value / mean),
    ({"value_weight": 2.0}, lambda value, mean: 2.0 * value / mean),
    (PAPER, lambda value, mean: 30 * 0.02 * 0.5 * value),
    (PAPER | {"gamma": 0}, lambda value, mean: 30 * 0.02 * 0.125 * value),
    (PAPER | {"beta": 1.0}, lambda value, mean: 30 * 0.02 * value),
    ({"alpha": 0.0}, lambda value, mean: 0.0),
]


@pytest.mark.parametrize(("settings", "weight"), VIT)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 0.999])
def test_turbo_vit(settings, weight, ratio):
    """Catches a penalty of other weight or block, means without sizes when merging is repeated, and a first round
    that takes more than every other token.
    """
    x, attention = tokens(19), value(19) + 0.05
    values = Values({"class": attention})
    found = planned(TurboVisionProcessor(ratio, **settings), x, values, frame=StepInfo(0, 3))
    for own, row, received in zip(found, x.tolist(), attention.tolist(), strict=True):
        assert own == turbo_vit(row, None if weight is None else received, weight, 19 - left(19, ratio))


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.02}, {"semantic": "none"}])
def test_turbo_vit_keeps_what_is_diverse_beyond_half(settings, leading):
    """Catches every other token gone before the choice, a choice made where half or fewer leave, by attention, or with
    the class token as one to keep or to join.
    """
    x, values = tokens(19 + leading), Values({"class": value(19 + leading) + 0.05})

    def found(num_left, how):
        processor = TurboVisionProcessor(keep=num_left, beyond_half=how, **settings)
        site = LayerInfo("tower", processor.ratio_of(19), None, semantic=values, num_leading=leading)
        plan = processor.plan(x, site, StepInfo())
        return plan.anchor_BM.gather(1, plan.slot_BN)

    for num_left in (1, 5, 9):
        for own, row in zip(found(num_left, "diverse").tolist(), x.tolist(), strict=True):
            expected = oracles.keep_diverse(row[leading:], num_left)
            assert own == [*range(leading), *(token + leading for token in expected)]
    for num_left in (10, 15, 19):
        assert torch.equal(found(num_left, "diverse"), found(num_left, "repeat"))


def test_turbo_vit_in_every_block():
    """Catches the number of a block taken in the text or for half of the tokens, and a threshold off by one."""
    x = tokens(12)

    def num_left(name="tower", num_tokens=12, **settings):
        processor = TurboVisionProcessor(semantic="none", **settings)
        plan = processor.plan(x[:, :num_tokens], LayerInfo(name, 0.25), StepInfo())
        return plan.num_slots

    assert num_left(num_removed=2) == 10 and num_left("text", num_removed=2) == 9 and num_left() == 9
    assert (
        num_left(num_removed=1) == 11 and num_left(num_removed=20) == 6 and num_left(num_removed=20, num_tokens=5) == 3
    )
    assert num_left(num_removed=1, num_tokens=1) == 1
    assert num_left(num_removed=2, ratio=0.0) == 12 and num_left(num_removed=2, ratio=0.0, keep=5) == 10
    assert num_left(threshold=13) == 9 and num_left(threshold=14) == 12 and num_left(num_removed=2, threshold=14) == 12


@pytest.mark.parametrize("given", ["class", "self"])
def test_turbo_vit_takes_column_means_where_there_is_no_class_token(given):
    """Catches means that nobody asked for, and none where the class token is missing."""
    x, by_class, by_mean = tokens(16), value(16, 1) + 0.1, value(16, 2) + 0.1
    values = Values({"class": by_class, "self": by_mean})
    assert planned(TurboVisionProcessor(0.4, semantic=given, value_weight=2.0), x, values)
    assert set(values.asked) == {given}
    only = Values({"self": by_mean})
    found = planned(TurboVisionProcessor(0.4, value_weight=2.0), x, only)
    assert found == planned(TurboVisionProcessor(0.4, semantic="self", value_weight=2.0), x, values)
    nothing = Values({"last": by_mean})
    bare = planned(TurboVisionProcessor(0.4, semantic="none"), x)
    assert planned(TurboVisionProcessor(0.4, value_weight=2.0), x, nothing) == bare != found
    assert planned(TurboVisionProcessor(0.4, value_weight=2.0), x) == bare
