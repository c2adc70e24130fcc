"""Plans that are widened by text and joined over frames, and attention over keys of several sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gen_turbo.tokens.frames import one_sequence
from gen_turbo.tokens.match import tile_soft_matching
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.tokens.weighted import default_scale, weigh_keys


def some_plan(batch: int = 2) -> TokenMap:
    """16 tokens in 10 slots."""
    x = torch.randn(batch, 16, 8, generator=torch.Generator().manual_seed(0))
    return tile_soft_matching(x, (4, 4), 6)


@pytest.mark.parametrize(("leading", "trailing"), [(0, 0), (3, 0), (0, 2), (3, 2), (1, 1)])
def test_text_around_the_tokens_goes_through_unchanged(leading, trailing):
    """Catches an offset that is left out of slots or anchors."""
    plan, x = some_plan(), torch.randn(2, leading + 16 + trailing, 4)
    wide = plan.between(leading, trailing)
    image = x[:, leading : leading + 16]
    before, after = x[:, :leading], x[:, leading + 16 :]
    assert torch.equal(wide.merge(x), torch.cat([before, plan.merge(image), after], 1))
    assert torch.equal(wide.select(x), torch.cat([before, plan.select(image), after], 1))
    short = wide.merge(x)
    middle = plan.unmerge(short[:, leading : leading + 10])
    assert torch.equal(wide.unmerge(short), torch.cat([before, middle, after], 1))
    assert plan.between(leading, trailing) is wide and (wide is plan) == (leading + trailing == 0)


def test_frames_become_one_sequence():
    """Catches slots that cross frames, and frames of one video given to another."""
    plan, x = some_plan(6), torch.randn(2, 48, 4)
    joined = one_sequence(plan, 3)
    frame_by_frame = plan.merge(x.reshape(6, 16, 4)).reshape(2, 30, 4)
    assert torch.equal(joined.merge(x), frame_by_frame)
    assert torch.equal(joined.slot_BN.gather(1, joined.anchor_BM), torch.arange(30).expand(2, -1))
    assert torch.equal(one_sequence(some_plan(1), 3).merge(x)[:, 10:20], some_plan(1).merge(x[:, 16:32]))
    with pytest.raises(ValueError, match="6 plan rows are no multiple of 4 frames"):
        one_sequence(plan, 4)


@pytest.mark.parametrize("channels", [8, 40])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_weighed_key_counts_as_that_many(channels, batch):
    """Catches a scale that follows the appended channel, and a weight instead of its logarithm."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, n, channels, generator=generator) for n in (7, 5, 5))
    sizes = torch.tensor([[1.0, 4.0, 1.0, 2.0, 3.0]])
    repeated = sizes[0].long()
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(repeated, 2), v.repeat_interleave(repeated, 2))
    query, key = weigh_keys(q, k, sizes.log(), default_scale(q))
    weighed = F.scaled_dot_product_attention(query, key, v, scale=default_scale(q))
    assert torch.allclose(weighed, expected, atol=1e-5)
    assert query.shape[-1] % 8 == 0
    unweighed = F.scaled_dot_product_attention(q, k, v)
    assert not torch.allclose(unweighed, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("channels", "wanted"), [(1, 8), (5, 8), (6, 8), (7, 16), (8, 16), (40, 48), (46, 48), (47, 56)]
)
def test_weighed_channels_are_the_next_multiple_of_8(channels, wanted):
    """Catches channels that fast kernels do not take, and more of them than are needed."""
    q = torch.zeros(1, 1, 2, channels)
    assert [x.shape[-1] for x in weigh_keys(q, q, torch.zeros(1, 2), 1.0)] == [wanted] * 2


def test_the_weight_of_a_large_key_survives_half_precision():
    """Catches the logarithm of a size rounded to 8 bits: 293 tokens of padding must not count as 299."""
    q, k = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 3, 8, dtype=torch.bfloat16)
    sizes = torch.tensor([[1.0, 293.0, 97.0]])
    scale = default_scale(q)
    query, key = weigh_keys(q, k, sizes.log(), scale)
    logits = (query.float() @ key.float().mT * scale)[0, 0, 0]
    assert (logits.exp() / sizes[0] - 1).abs().max() < 1e-3


def test_rows_are_plans_of_their_own():
    """Catches rows that lose their batch axis or another row's anchors."""
    plan = TokenMap.from_destinations(torch.tensor([[0, 0, 2], [0, 1, 1]]))
    x = torch.arange(6.0).reshape(2, 3, 1)
    for row, one in enumerate(plan.by_row()):
        assert torch.equal(one.merge(x[row : row + 1]), plan.merge(x)[row : row + 1])
        assert torch.equal(one.anchor_BM, plan.anchor_BM[row : row + 1])
