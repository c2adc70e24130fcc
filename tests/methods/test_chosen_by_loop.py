"""What methods that choose by attention or diversity plan, against plain loops from their papers."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.divprune import DivPruneProcessor
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.methods.fastv import FastVProcessor
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.methods.resize import ResizeProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.visionzip import VisionZipProcessor
from gen_turbo.methods.vscan import VScanProcessor
from tests.methods.loops import RATIOS, Values, join_nearest, left, planned, ranked, tokens, value

WAYS = {"fastv": (FastVProcessor, "last"), "pyramiddrop": (PyramidDropProcessor, "next")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_ranks_of_the_last_tokens_attention(way, ratio):
    """Catches tokens of least attention kept, attention of another layer, and one token too many or too few."""
    method, kind = WAYS[way]
    score = value(20)
    found = planned(method(ratio), tokens(20), Values({kind: score}), name="decoder")
    for own, row in zip(found, score.tolist(), strict=True):
        assert own == join_nearest(ranked(row)[: left(20, ratio)], 20)
    with pytest.raises(ValueError, match=f"{way} reads the attention of the last token, which only a decoder has"):
        planned(method(ratio), tokens(20), Values({"self": score}), name="decoder")
    with pytest.raises(ValueError, match="which only a decoder has"):
        planned(method(ratio), tokens(20))


NEEDING = [VisionZipProcessor, VScanProcessor, FastVProcessor, PyramidDropProcessor, ResizeProcessor]


@pytest.mark.parametrize("method", [*NEEDING, DivPruneProcessor, EAdaPruneProcessor, TurboVisionProcessor])
def test_nothing_is_read_where_nothing_leaves(method):
    """Catches a ratio of 0, or one that is too small for a token, that asks for attention or moves a token."""
    for ratio in (0.0, 0.01):
        if ratio == 0.01 and method in (FastVProcessor, ResizeProcessor):
            continue
        site = LayerInfo("pre_llm", ratio, (4, 4), semantic=None)
        plan = method(ratio).plan(tokens(16), site, StepInfo())
        assert plan.is_identity and plan.slot_BN[0].tolist() == list(range(16))
        assert len(plan.slot_BN) == (2 if method is TurboVisionProcessor else 1)


@pytest.mark.parametrize("method", [DivPruneProcessor, EAdaPruneProcessor])
@pytest.mark.parametrize("ratio", RATIOS)
def test_diversity(method, ratio):
    """Catches the most alike kept, a distance that is not the cosine's, and another number of tokens."""
    x = tokens(14)
    for own, row in zip(planned(method(ratio), x), x.tolist(), strict=True):
        assert own == oracles.keep_diverse(row, left(14, ratio))


def visionzip(rows: list[list[float]], attention: list[float], num_kept: int, share: float) -> list[int]:
    """The token whose place each takes: dominant ones, evenly spaced targets of the rest, and who joins them."""
    num_merged = min(num_kept, max(1, round(num_kept * share))) if share > 0 else 0
    dominant = ranked(attention)[: num_kept - num_merged]
    rest = [n for n in range(len(rows)) if n not in dominant]
    targets = [rest[number * len(rest) // num_merged] for number in range(num_merged)] or dominant[:1]
    final = []
    for n, row in enumerate(rows):
        alike = [oracles.cosine(row, rows[target]) for target in targets]
        final.append(n if n in dominant or n in targets else targets[alike.index(max(alike))])
    return final


@pytest.mark.parametrize("contextual", [0.0, 0.01, 10 / 64, 0.5, 1.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_visionzip(contextual, ratio):
    """Catches contextual tokens of another number or place, and tokens that join dominant ones; all or none merged."""
    x, attention = tokens(21), value(21)
    found = planned(VisionZipProcessor(ratio, contextual=contextual), x, Values({"class": attention}))
    for own, row, received in zip(found, x.tolist(), attention.tolist(), strict=True):
        assert own == visionzip(row, received, left(21, ratio), contextual)


@pytest.mark.parametrize("method", [VisionZipProcessor, VScanProcessor])
def test_where_the_towers_attention_comes_from(method):
    """Catches column means taken though there is a class token, and a class token taken though means are asked for."""
    by_class, by_mean = value(16, 1), value(16, 2)
    early = {"early class": value(16, 3), "early self": value(16, 4)} if method is VScanProcessor else {}
    both = Values({"class": by_class, "self": by_mean} | early)
    x = tokens(16)
    means = Values({kind: one for kind, one in both.values.items() if kind.endswith("self")})
    from_class, from_means = (planned(method(0.5), x, source, (4, 4)) for source in (both, means))
    assert from_class != from_means
    assert not {"self", "early self"} & set(both.asked)
    assert planned(method(0.5, semantic="self"), x, both, (4, 4)) == from_means
    with pytest.raises(ValueError, match="reads the attention of a vision tower whose patches are the tokens here"):
        planned(method(0.5), x, Values({"last": by_mean}), (4, 4))


def vscan(rows, early, late, num_kept: int, share: float, grid: tuple[int, int]) -> list[int]:
    """The token whose place each takes: the best of each of 4 x 4 windows in turn, the best of all, who joins them."""
    height, width = grid
    down, across = (min(4, height), min(4, width)) if height > 1 else (1, min(16, width))
    windows: dict[tuple[int, int], list[int]] = {}
    for n in ranked(early):
        windows.setdefault((n // width * down // height, n % width * across // width), []).append(n)
    in_turn = sorted((rank, -early[n], n) for window in windows.values() for rank, n in enumerate(window))
    local = [n for _, _, n in in_turn][: math.floor(num_kept * share)]
    others = [n for n in ranked(late) if n not in local]
    kept = sorted(local + others[: num_kept - len(local)])
    alike = [[oracles.cosine(row, rows[other]) for other in kept] for row in rows]
    return [n if n in kept else kept[row.index(max(row))] for n, row in enumerate(alike)]


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (3, 9), (24, 1), (13, 2), (2, 20), None])
@pytest.mark.parametrize(("ratio", "local"), [(0.25, 0.5), (0.5, 1.0), (0.8, 0.5), (0.8, 0.0), (0.999, 0.5)])
def test_vscan(grid, ratio, local):
    """Catches windows of other sides, second choices before first ones, and a token that both scans choose."""
    num_tokens = math.prod(grid) if grid else 40
    x, early, late = tokens(num_tokens), value(num_tokens, 1), value(num_tokens, 2)
    values = Values({"early class": early, "class": late})
    found = planned(VScanProcessor(ratio, local=local), x, values, grid)
    for own, *row in zip(found, x.tolist(), early.tolist(), late.tolist(), strict=True):
        assert own == vscan(*row, left(num_tokens, ratio), local, grid or (1, num_tokens))


@pytest.mark.parametrize("ratio", RATIOS)
def test_vscan_in_the_decoder(ratio):
    """Catches a second stage that scans the tower once more, or reads the attention of the layer before."""
    score = value(20, 5)
    found = planned(VScanProcessor(ratio), tokens(20), Values({"next": score}), name="decoder")
    for own, row in zip(found, score.tolist(), strict=True):
        assert own == join_nearest(ranked(row)[: left(20, ratio)], 20)
    with pytest.raises(ValueError, match="vscan reads the attention of a vision tower .* and of a decoder"):
        planned(
            VScanProcessor(ratio), tokens(20), Values({"last": score, "self": score, "class": score}), name="decoder"
        )


def test_features_of_half_a_type_choose_as_their_exact_values():
    """Catches cosines in the type of the features, in which near ones are equal."""
    x, attention = tokens(40).to(torch.bfloat16), value(40)
    values = Values({"early class": value(40, 1), "class": attention})
    for method in (VisionZipProcessor(0.7), VScanProcessor(0.7), DivPruneProcessor(0.7)):
        assert planned(method, x, values, (5, 8)) == planned(method, x.float(), values, (5, 8))


@pytest.mark.parametrize(
    ("settings", "num_layers", "expected"),
    [
        ({"keep": 64}, 32, {0: 96, 16: 32}),
        ({"keep": 64, "cut": 8}, 32, {0: 128, 8: 43}),
        ({"keep": 64, "late": 1.0}, 32, {0: 64, 16: 64}),
        ({"keep": 64, "late": 0.0}, 32, {0: 128, 16: 1}),
        ({"keep": 1, "late": 0.0, "cut": 31}, 32, {0: 1, 31: 1}),
        ({"keep": 500}, 32, {0: 576, 16: 424}),
        ({"keep": 64}, 5, {0: 107, 2: 35}),
        ({"keep": 64}, 1, {0: 64, 1: 64}),
        ({"ratio": 0.5, "late": 0.5, "cut": 3}, 4, {0: 329, 3: 165}),
        ({"ratio": 0.0}, 4, {0: 576, 2: 576}),
    ],
)
def test_stages_of_vscan(settings, num_layers, expected):
    """Catches a mean that is not the one asked for, a second stage of another share, and stages of no token."""
    assert VScanProcessor(**settings).stages(num_layers, 576) == expected


def test_the_early_block_is_a_quarter_into_the_tower():
    """Catches the seventh block of 24 for the sixth, and a block before the first."""
    assert [VScanProcessor().early_block(blocks) for blocks in (1, 3, 4, 7, 8, 12, 24, 32)] == [0, 0, 0, 0, 1, 2, 5, 7]


@pytest.mark.parametrize(
    ("settings", "num_layers", "num_tokens", "expected"),
    [
        ({}, 32, 576, {0: 576, 8: 288, 16: 144, 24: 72}),
        ({}, 28, 100, {0: 100, 7: 51, 14: 26, 21: 13}),
        ({"keep": 27}, 8, 64, {0: 64, 2: 48, 4: 36, 6: 27}),
        ({"keep": 1}, 8, 27, {0: 27, 2: 9, 4: 3, 6: 1}),
        ({"ratio": 0.75, "cuts": [3, 5]}, 8, 64, {0: 64, 3: 32, 5: 16}),
        ({"ratio": 0.75, "cuts": [1]}, 8, 64, {0: 64, 1: 16}),
        ({}, 2, 64, {0: 64, 1: 8}),
        ({}, 3, 64, {0: 64, 1: 23, 2: 8}),
        ({"ratio": 0.0}, 8, 64, {0: 64, 2: 64, 4: 64, 6: 64}),
    ],
)
def test_stages_of_pyramiddrop(settings, num_layers, num_tokens, expected):
    """Catches shares that do not multiply to the last one, other quarters, and a cut that has no layer before it."""
    assert PyramidDropProcessor(**settings).stages(num_layers, num_tokens) == expected


@pytest.mark.parametrize(("energy", "kept"), [(0.5, 1), (0.80, 1), (0.81, 2), (0.96, 2), (0.98, 3), (1.0, 3)])
@pytest.mark.parametrize("shape", [(12, 4), (12, 20), (12, 12)])
def test_budgets_are_the_least_that_hold_the_energy(energy, kept, shape):
    """Catches singular values not squared, the number before the one that suffices, and a bound that is left out."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.linalg.qr(torch.randn(side, side, dtype=torch.float64, generator=generator))[0] for side in shape]
    x = 9 * sides[0][:, :3] * torch.tensor([0.8, 0.17, 0.03], dtype=torch.float64).sqrt() @ sides[1][:3]
    image = torch.stack([x, x])
    made = EAdaPruneProcessor(energy=energy)
    expected = [kept] * 2
    if energy == 1.0 and shape[1] != 4:
        # What is left of rounding is energy too.
        assert all(number >= kept for number in made.budgets(image))
    elif energy not in (0.80,):
        assert made.budgets(image) == expected
    assert EAdaPruneProcessor(energy=energy, ratio=0.5).budgets(image) == [max(6, kept)] * 2 or energy == 1.0
    assert EAdaPruneProcessor(0.0, energy=energy).budgets(image) == [12, 12]
