"""Counting of attention arithmetic on a real, tiny UNet."""

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel

from gen_turbo.metrics.cost import Cost, count_cost
from tests.tiny_hosts import image, sd15_unet, sd_pipeline, unet_inputs

TOP = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def _count(unet: UNet2DConditionModel) -> Cost:
    with torch.no_grad(), count_cost(unet) as cost:
        inputs = unet_inputs()
        unet(inputs.pop("sample"), 10, **inputs)
    return cost


def test_attention_is_counted_by_layer() -> None:
    """Catches a count that forgets heads or batch, or mixes self- with cross-attention."""
    cost = _count(sd15_unet())
    assert cost.attention_flops([TOP]) == 4 * 2 * 256 * 256 * 16
    assert cost.attention_flops([TOP.replace("attn1", "attn2")]) == 4 * 2 * 256 * 6 * 16
    assert cost.tokens()[TOP] == [256]
    assert cost.matching_flops == 0


def test_projections_are_counted_inside_attention_only() -> None:
    """Catches a count that takes in the feed-forward layers or the time embedding."""
    assert _count(sd15_unet()).projection_flops[TOP] == 4 * 2 * (2 * 256) * 16 * 16


def test_top_self_attention_leaves_cross_attention_out() -> None:
    """Catches a choice by the number of queries alone."""
    names = _count(sd15_unet()).top_self_attention()
    assert TOP in names
    assert all(name.endswith("attn1") for name in names)
    assert len(names) == 3


def test_only_the_model_is_counted() -> None:
    """Catches an autoencoder whose attention runs on as many tokens as the finest of the UNet."""
    pipe = sd_pipeline()
    with count_cost(pipe.unet) as cost:
        image(pipe, steps=1)
    assert set(cost.tokens()) == {name.removesuffix(".processor") for name in pipe.unet.attn_processors}
    assert all(name.endswith("attn1") for name in cost.top_self_attention())


def test_package_tomesd_is_counted() -> None:
    """Catches counting by processors, which a patched block never meets, and forgetting what matching costs."""
    unet = sd15_unet()
    tomesd.apply_patch(unet, ratio=0.5)
    cost = _count(unet)
    assert cost.tokens()[TOP] == [128]
    blocks = 3
    assert cost.matching_flops == blocks * 2 * 2 * 192 * 64 * 16


def test_nothing_stays_on_the_model() -> None:
    """Catches hooks that survive an exception inside the block."""
    unet = sd15_unet()
    before = {name: dict(module.__dict__) for name, module in unet.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    with pytest.raises(TypeError), count_cost(unet):
        unet("not a tensor")
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    assert {name: list(module.__dict__) for name, module in unet.named_modules()} == {
        name: list(attributes) for name, attributes in before.items()
    }
