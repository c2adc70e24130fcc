"""What a report says is what happened."""

from __future__ import annotations

import pytest
from stated import TurboProcessor

from gen_turbo import attach, report
from gen_turbo.api import NoEffectWarning
from gen_turbo.metrics.cost import count_cost
from tests.tiny_hosts import image, run_unet, sd15_unet, sd_pipeline, unet_inputs


def test_every_line_of_the_text():
    """Catches a report that leaves out a resolution, a reason or the age of plans."""
    unet = sd15_unet()
    with attach(unet, TurboProcessor(0.5, restore="copy", match_every=0, ratios={2: 0.25})):
        before = str(report(unet))
        run_unet(unet, **unet_inputs())
        told = report(unet)
    assert "not run yet" in before and before.startswith("6 of 14 layers reached, 0% of their FLOPs saved")
    lines = str(told).splitlines()
    assert lines[0].startswith("6 of 14 layers reduced, ") and f"{told.flops_saved:.0%}" in lines[0]
    assert lines[1:3] == ["  16 x 16: 256 -> 128 tokens in 3 layers", "  8 x 8: 64 -> 48 tokens in 3 layers"]
    assert sum("4 reduced and 0 full calls, token maps up to 3 steps old" in line for line in lines) == 6
    assert "  left alone, cross-attention: 7" in lines and "  left alone, level not chosen: 1" in lines
    assert str(report(unet)) == "no gen_turbo processor is attached"


def test_layers_that_ran_in_full_are_said_to_have_run():
    """Catches "3 layers reduced" and "not run yet, 0 -> 0 tokens" of layers that a ratio of 0 has run in every step."""
    unet = sd15_unet()
    with attach(unet, TurboProcessor(0.0)):
        run_unet(unet, **unet_inputs())
        told = str(report(unet))
    assert told.count("in full in all of 4 calls") == 3 and "not run yet" not in told and " -> " not in told
    assert told.startswith("0 of 14 layers reduced, 0% of their FLOPs saved")


def test_one_of_a_thing_is_no_plural():
    """Catches "a run of 1 steps", in the warning and in the report, and tokens counted where nothing was reduced."""
    pipe = sd_pipeline()
    with attach(pipe, TurboProcessor(0.5)):
        with pytest.warns(NoEffectWarning, match="no token was removed in this run of 1 step: "):
            image(pipe, steps=1)
        assert str(report(pipe)).count("0 reduced and 1 full call, ") == 3
        # What would have been left of the tokens is no result of a run that reduced none.
        assert " tokens in " not in str(report(pipe))


@pytest.mark.parametrize("kv_only", [False, True])
def test_its_flops_are_those_that_ran(kv_only):
    """Catches a formula that drifts from what is computed."""
    unet = sd15_unet()
    processor = TurboProcessor(0.5, restore="copy", semantic="none", kv_only=kv_only)
    with attach(unet, processor) as attachment, count_cost(unet) as cost:
        run_unet(unet, **unet_inputs())
        told = report(unet)
    projections = sum(cost.projection_flops[name] for name in attachment.layers)
    counted = cost.attention_flops(attachment.layers) + projections
    assert counted == sum(layer.flops for layer in told.layers) < sum(layer.stock_flops for layer in told.layers)
