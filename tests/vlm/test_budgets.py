"""Budgets of images by the spectrum of their features, against singular values and rows alone."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import attach, report
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.tokens.select import keep_diverse
from gen_turbo.vlm.planning import shared_budgets
from tests.snapshots import differences, model_state
from tests.vlm import oracle
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.tiny_vlms import PROMPTS, VLMS


def of_rank(rank, num_tokens=16, width=12):
    """Tokens (N, C) of an image whose energy lies in so many directions evenly."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for side in (num_tokens, width))
    return left[:, :rank] @ right[:rank]


@pytest.mark.parametrize("width", [12, 40])
def test_a_budget_is_the_number_of_directions(width):
    """Catches energy taken for singular values, and the matrix of the longer side mistaken for that of the shorter."""
    images = torch.stack([of_rank(rank, width=width) for rank in (3, 5, 9)])
    assert EAdaPruneProcessor(energy=0.999).budgets(images) == [3, 5, 9]
    assert EAdaPruneProcessor(energy=0.5).budgets(images) == [2, 3, 5]


def test_budgets_equal_singular_values():
    """Catches a spectrum of other than the features themselves."""
    tokens = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(2))
    expected = []
    for image in tokens:
        energy = torch.linalg.svdvals(image.double()).square()
        expected.append(next(k for k in range(1, 17) if energy[:k].sum() >= 0.8 * energy.sum()))
    assert EAdaPruneProcessor(energy=0.8).budgets(tokens) == expected


def test_little_energy_counts_as_well():
    """Catches energies added up in float32, where what is left of a share near one is lost."""
    image = torch.diag(torch.tensor([1.0, 1e-5, 1e-5, 1e-5], dtype=torch.float64))[None]
    assert EAdaPruneProcessor(0.9, energy=1 - 1.5e-10).budgets(image) == [3]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_no_numbers_leave_the_others_alone(odd):
    """Catches an image of NaN that ends the call of all images, or changes what another image keeps."""
    images = torch.stack([of_rank(rank) for rank in (3, 5, 9)])
    images[1, 4, 2] = odd
    budgets = EAdaPruneProcessor(energy=0.999).budgets(images)
    assert (budgets[0], budgets[2]) == (3, 9) and 1 <= budgets[1] <= 16
    images[1, 4] = odd
    without = images[1].index_fill(0, torch.tensor(4), 0.0)
    assert (
        EAdaPruneProcessor(energy=0.999).budgets(images)[1]
        == EAdaPruneProcessor(energy=0.999).budgets(without[None])[0]
    )
    images[1] = odd
    assert EAdaPruneProcessor(energy=0.999).budgets(images) == [3, 1, 9]
    shared = shared_budgets(images, 8)
    assert sum(number * len(rows) for number, rows in shared) <= 24 and all(number >= 1 for number, _ in shared)


@pytest.mark.parametrize(
    ("settings", "expected"), [({"keep": 8}, [8, 9]), ({"ratio": 0.25}, [12, 12]), ({"ratio": 0}, [16, 16])]
)
def test_no_image_keeps_fewer_than_asked(settings, expected):
    """Catches a bound that nothing reads, and one that all images are cut to."""
    images = torch.stack([of_rank(rank) for rank in (3, 9)])
    assert EAdaPruneProcessor(energy=0.999, **settings).budgets(images) == expected


@pytest.mark.parametrize("family", ["llava", "qwen2_5", "gemma3"])
def test_rows_of_other_budgets_equal_rows_alone(family):
    """Catches one budget for all images of a call, and rows of other lengths that see each other's padding."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["even"].inputs(vlm)
    images, _ = oracle.features_of(model, vlm, inputs)
    methods = [EAdaPruneProcessor(energy=percent / 100) for percent in range(40, 99)]
    # Random images show much the same; at some share of energy they differ by one token.
    method, budgets = next(
        (method, budgets)
        for method in methods
        for budgets in [method.budgets(torch.stack(images))]
        if len(set(budgets)) == 2
    )
    with attach(model, method):
        new, logits, _ = generate(model, inputs)
        rows = report(model).layers
    assert [(row.num_tokens, row.num_kept) for row in rows] == [(32, sum(budgets))]

    def plan(tokens):
        return keep_diverse(tokens, method.budgets(tokens)[0])

    expected = oracle.generated_logits(model, vlm, inputs, new, oracle.Method(plan, is_merged=False))
    assert float((logits - expected).abs().max()) < TOLERANCE


def test_nothing_removed_is_bit_identical_and_detach_exact():
    """Catches a call that changes though every token stays, and hooks that stay."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    # The first call leaves hooks of transformers' own.
    stock, before = generate(model, inputs)[1], model_state(model)
    with attach(model, EAdaPruneProcessor(0.0)):
        assert torch.equal(generate(model, inputs)[1], stock)
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_energy_is_a_share(energy):
    """Catches a share that keeps nothing or means nothing."""
    with pytest.raises(ValueError, match="energy"):
        EAdaPruneProcessor(energy=energy)


def test_a_shared_budget_is_refused():
    """Catches two ways to say a budget, one of which nothing reads."""
    with pytest.raises(ValueError, match="adaptive"):
        attach(VLMS["llava"].make(), EAdaPruneProcessor(adaptive=True))
