"""Skipping in denoisers whose blocks share short sequences: around a run, of a block alone, never inside of a run."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from stated import TurboProcessor

from gen_turbo import attach, report
from gen_turbo.models.cuts import unet_cuts
from tests import tiny_transformers
from tests.schedules import blocks_of, par
from tests.snapshots import differences, model_state
from tests.tiny_hosts import UNETS, run_unet, unet_inputs


@pytest.mark.parametrize(("name", "units"), [("sd15", ["deep.1", "output"]), ("sd3", ["output"]), ("flux", ["output"])])
@pytest.mark.parametrize("unit", [0, 1])
def test_skipping_goes_around_runs_of_blocks(name, units, unit):
    """Catches a run that is left open by a skip, and detail that is corrected by the age of another run."""
    skipped = units[unit % len(units)]
    is_unet = name in UNETS
    model = UNETS[name]() if is_unet else tiny_transformers.build(name)

    def run():
        return run_unet(model, **unet_inputs()) if is_unet else tiny_transformers.run(name, model)

    stock, before = run(), model_state(model)
    for settings in ({"restore": "copy"}, {"restore": "residual", "warmup_steps": 1}):
        inner = TurboProcessor(0.4, scope="block", merge_span=0, **settings)
        with attach(model, inner):
            merged = run()
        with attach(model, par(model, {skipped: [2]}, inner=inner)):
            outputs = run()
            reached = report(model)
        assert reached.skipped == {skipped: (1, 3)} and any(layer.num_reduced for layer in reached.layers)
        assert torch.equal(outputs[:2], merged[:2]) and not torch.equal(outputs[2], merged[2])
        assert (outputs[3] - stock[3]).norm() < 0.6 * stock[3].norm()
    assert differences(before, model_state(model)) == []


def test_a_block_alone_in_its_run_is_skipped():
    """Catches a block of its own stack that is taken for a run, or shortened though it is skipped."""
    unet = UNETS["sd15"]()
    block = blocks_of(unet)[0]
    outputs = []
    for length in (0, 1):
        inner = TurboProcessor(0.4, scope="block", merge_span=length, warmup_steps=1)
        with attach(unet, par(unet, {block: [2, 3]}, inner=inner)):
            outputs.append(run_unet(unet, **unet_inputs()))
            assert report(unet).skipped == {block: (2, 2)}
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "settings", [{"scope": "block", "merge_span": 0}, {"scope": "block", "merge_span": 2}, {"scope": "model"}]
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_block_inside_of_a_run_is_not_skipped(settings, place):
    """Catches a forecast for all tokens added to a short sequence, a half changed model, and advice of no effect."""
    model = tiny_transformers.build("sd3")
    before, block = model_state(model), blocks_of(model)[place]
    told = rf"the schedule skips {block}, but of blocks that share one short sequence .*scope='block' with merge_span=1"
    with pytest.raises(ValueError, match=told):
        attach(model, par(model, {block: [2], "output": [3]}, inner=TurboProcessor(0.4, **settings)))
    assert differences(before, model_state(model)) == []
    with attach(model, par(model, {block: [2]}, inner=TurboProcessor(0.4, scope="block", warmup_steps=1))):
        tiny_transformers.run("sd3", model)
        assert report(model).skipped == {block: (1, 3)}


def test_a_unet_without_a_middle_block_is_cut_where_something_enters():
    """Catches a cut behind which nothing is left to forecast, which kept PAR from such a model, and one too few."""
    model = UNet2DConditionModel(
        sample_size=16,
        norm_num_groups=4,
        cross_attention_dim=32,
        layers_per_block=1,
        block_out_channels=(16,),
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    ).eval()
    # Two layers on the way up: before the last one lies the first, and before the first nothing.
    assert [unit.name for unit in unet_cuts(model)] == ["deep.1"]
    inputs = unet_inputs() | {"encoder_hidden_states": torch.ones(2, 6, 32)}
    with attach(model, par(model, {"deep.1": [2]})):
        assert run_unet(model, **inputs).isfinite().all()
        assert report(model).skipped == {"deep.1": (1, 3)}
