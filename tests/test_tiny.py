"""The embedded model's architecture: how the inner network grows into the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gen_turbo.pipelines import tiny


@torch.no_grad()
def test_a_grown_unet_gives_what_the_inner_one_gives_on_pooled_latents():
    """Catches a level whose weights are copied to its neighbour, and a new level that scrambles what was learnt."""
    torch.manual_seed(0)
    inner, outer, other = (tiny.make_unet(tiny.LEVELS - less).eval() for less in (1, 0, 0))
    tiny.grow(inner, outer)
    coarse = F.interpolate(torch.randn(1, 4, 4, 4), size=16, mode="bicubic")
    fine = F.interpolate(coarse, scale_factor=2, mode="nearest")
    time, text = torch.tensor([500]), torch.randn(1, 5, tiny.TEXT_WIDTH)
    wanted = F.interpolate(inner(coarse, time, text).sample, scale_factor=2)

    def likeness(unet) -> float:
        return F.cosine_similarity(unet(fine, time, text).sample.flatten(), wanted.flatten(), dim=0).item()

    assert likeness(outer) > 0.6
    assert likeness(outer) > likeness(other) + 0.3


def test_a_unet_of_other_widths_does_not_grow():
    """Catches a copy that skips what does not fit."""
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny.grow(tiny.make_unet(3), tiny.make_unet(4))
