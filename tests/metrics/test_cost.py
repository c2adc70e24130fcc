"""Counting of attention arithmetic on a real, tiny UNet."""

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel

from gen_turbo.metrics.cost import Cost, count_cost

TOP = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def _unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def _count(unet: UNet2DConditionModel) -> Cost:
    with torch.no_grad(), count_cost(unet) as cost:
        unet(torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 12))
    return cost


def test_attention_is_counted_by_layer() -> None:
    """Catches a count that forgets heads or batch, or mixes self- with cross-attention."""
    cost = _count(_unet())
    assert cost.attention_flops([TOP]) == 4 * 2 * 64 * 64 * 16
    assert cost.attention_flops([TOP.replace("attn1", "attn2")]) == 4 * 2 * 64 * 5 * 16
    assert cost.tokens()[TOP] == [64]
    assert cost.matching_flops == 0


def test_projections_are_counted_inside_attention_only() -> None:
    """Catches a count that takes in the feed-forward layers or the time embedding."""
    assert _count(_unet()).projection_flops[TOP] == 4 * 2 * (2 * 64) * 16 * 16


def test_top_self_attention_leaves_cross_attention_out() -> None:
    """Catches a choice by the number of queries alone."""
    names = _count(_unet()).top_self_attention()
    assert TOP in names
    assert all(name.endswith("attn1") for name in names)
    assert len(names) == 3


def test_package_tomesd_is_counted() -> None:
    """Catches counting by processors, which a patched block never meets, and forgetting what matching costs."""
    unet = _unet()
    tomesd.apply_patch(unet, ratio=0.5)
    cost = _count(unet)
    assert cost.tokens()[TOP] == [32]
    blocks = 3
    assert cost.matching_flops == blocks * 2 * 2 * 48 * 16 * 16


def test_nothing_stays_on_the_model() -> None:
    """Catches hooks that survive an exception inside the block."""
    unet = _unet()
    before = {name: dict(module.__dict__) for name, module in unet.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    with pytest.raises(TypeError), count_cost(unet):
        unet("not a tensor")
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    assert {name: list(module.__dict__) for name, module in unet.named_modules()} == {
        name: list(attributes) for name, attributes in before.items()
    }
