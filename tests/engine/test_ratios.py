"""Ratios by layer and by step: what is asked for is what runs."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, report
from tests.tiny_hosts import image, run_unet, sd15_unet, sd_pipeline, unet_inputs

TIMES = (900, 800, 700, 600, 500, 400)


def _kept(model, **settings):
    """Tokens kept in each reduced call of the last layer, by step; all of them where it ran in full."""
    kept = []
    with attach(model, TurboProcessor(**settings)) as attachment:
        for step in range(len(TIMES)):
            run_unet(model, TIMES[step : step + 1], **unet_inputs())
            row = next(layer for layer in report(model).layers if layer.name == attachment.layers[-1])
            kept.append((row.num_kept, row.num_full))
    return [
        tokens if full == before else 256 for (tokens, full), (_, before) in zip(kept, [(0, 0), *kept], strict=False)
    ]


def test_named_layers_have_their_own_ratio():
    """Catches a pattern that reaches all layers, and a layer of ratio 0 that is merged."""
    unet = sd15_unet()
    ratios = {"up_blocks.*": 0.25, "up_blocks.2.attentions.1.*": 0.0, "down_blocks.1.*.attn1": 0.5}
    with attach(unet, TurboProcessor(0.4, restore="copy", layer_ratios=ratios)):
        run_unet(unet, **unet_inputs())
        rows = {layer.name: layer for layer in report(unet).layers if layer.status == "reduced"}
    left = {name.partition(".transformer")[0]: row.num_tokens - row.num_kept for name, row in rows.items()}
    assert left == {
        "down_blocks.0.attentions.0": int(256 * 0.4),
        "down_blocks.1.attentions.0": 32,
        "up_blocks.1.attentions.0": 16,
        "up_blocks.1.attentions.1": 16,
        "up_blocks.2.attentions.0": 64,
        "up_blocks.2.attentions.1": 0,
    }


def test_a_factor_by_step_changes_what_is_removed():
    """Catches a plan of one ratio that serves a step of another."""
    kept = _kept(sd15_unet(), ratio=0.4, restore="copy", step_scale={0: 0.0, 2: 0.5, 4: 1.5})
    assert kept == [256, 256, 256 - 51, 256 - 51, 256 - 153, 256 - 153]


def test_corrected_layers_change_their_ratio_at_a_full_step():
    """Catches detail of one plan added to the output of another, and memory that outlives a pause."""
    scale = {0: 1.0, 3: 0.5}
    unet, inputs = sd15_unet(), unet_inputs()
    settings = {"ratio": 0.4, "warmup_steps": 1, "full_every": 4, "extrapolation_order": 1}
    with attach(unet, TurboProcessor(**settings, step_scale=scale)):
        changed = run_unet(unet, TIMES, **inputs)
    with attach(unet, TurboProcessor(**settings)):
        constant = run_unet(unet, TIMES, **inputs)
    # Full steps are 0 and 4; the half ratio waits for the latter, and only what follows it differs.
    assert torch.equal(changed[:5], constant[:5]) and not torch.equal(changed[5], constant[5])
    with attach(unet, TurboProcessor(**settings, step_scale={1: 0.0, 3: 1.0})):
        run_unet(unet, TIMES[:4], **inputs)
        assert {layer.num_reduced for layer in report(unet).layers if layer.status == "reduced"} == {0}


@pytest.mark.parametrize("restore", ["residual", "copy"])
def test_a_factor_of_one_is_the_same_image(restore):
    """Catches arithmetic that differs where nothing is asked for."""
    pipe = sd_pipeline()
    pipe.set_attn_processor(TurboProcessor(0.4, restore=restore))
    plain = image(pipe)
    pipe.set_attn_processor(
        TurboProcessor(0.4, restore=restore, step_scale={0: 1.0}, layer_ratios={"down_blocks.0.*": 0.4})
    )
    assert torch.equal(image(pipe), plain)


def test_a_scale_of_zero_is_bit_identical():
    """Catches a merge by an empty plan."""
    unet, inputs = sd15_unet(), unet_inputs()
    stock = run_unet(unet, **inputs)
    for settings in ({"step_scale": {0: 0.0}}, {"layer_ratios": {"*": 0.0}}):
        with attach(unet, TurboProcessor(0.4, **settings)):
            assert torch.equal(run_unet(unet, **inputs), stock)
