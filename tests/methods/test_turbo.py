"""What is special about Turbo."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import ToMeProcessor, TurboProcessor
from gen_turbo.method import LayerInfo, StepInfo


def _plan(processor, tokens, value=None, num_plans=0):
    site = LayerInfo("here", processor.ratio, (8, 8), semantic=lambda kind: value)
    return processor.plan(tokens, site, StepInfo(num_plans=num_plans))


def _tokens():
    return torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(1))


def test_an_attended_token_never_leaves():
    """Catches a semantic value that is computed and not used, or used with the wrong sign."""
    tokens = _tokens()
    tokens[:, 9] = tokens[:, 0]
    value = torch.ones(1, 64)
    processor = TurboProcessor(0.5, value_weight=0.05)
    assert 9 not in _plan(processor, tokens, value).anchor_BM
    value[:, 9] = 1000.0
    assert 9 in _plan(processor, tokens, value).anchor_BM


def test_without_semantic_value_over_the_whole_image_it_is_tome():
    """Catches a difference from the published rule beside the one that Turbo adds."""
    turbo = _plan(TurboProcessor(0.5, value_weight=0.0, tile=0), _tokens())
    tome = _plan(ToMeProcessor(0.5, is_hashed=False), _tokens())
    assert torch.equal(turbo.slot_BN, tome.slot_BN)


def test_tiles_shift_on_alternate_plans():
    """Catches tiles that always stand at the same place, which show as seams."""
    plans = [_plan(TurboProcessor(0.5, tile=4), _tokens(), num_plans=n).slot_BN for n in range(3)]
    assert torch.equal(plans[0], plans[2]) and not torch.equal(plans[0], plans[1])


@pytest.mark.parametrize(("side", "reach"), [(8, 4), (16, 4), (24, 6), (32, 8), (64, 8)])
def test_small_images_have_smaller_tiles(side, reach):
    """Catches one size of tiles for all, which in a small image merges tokens of distant places."""
    tokens = torch.randn(1, side * side, 8, generator=torch.Generator().manual_seed(1))
    processor = TurboProcessor(0.75)
    plan = processor.plan(tokens, LayerInfo("here", 0.75, (side, side)), StepInfo())
    place = torch.arange(side * side)
    anchor = plan.anchor_BM[0][plan.slot_BN[0]]
    rows, columns = (place // side - anchor // side).abs(), (place % side - anchor % side).abs()
    assert max(rows.max(), columns.max()) < reach and rows.max() >= reach // 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"semantic": "mood"}, "semantic must be 'self', 'text' or 'none'; got 'mood'"),
        ({"value_weight": -1.0}, "value_weight must not be negative"),
        ({"tile": 1}, "tile must be 0"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    """Catches a setting that is taken without a look."""
    with pytest.raises(ValueError, match=words):
        TurboProcessor(**settings)
