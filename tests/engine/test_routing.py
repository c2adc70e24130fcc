"""Skipping in denoisers on real classes: what is skipped does not run, what is forecast is a line, nothing stays."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline
from stated import TurboProcessor
from torch import nn

from gen_turbo import PARProcessor, attach, report
from gen_turbo.api import attachments
from gen_turbo.engine.denoiser import NoEffectWarning
from tests import tiny_transformers
from tests.schedules import blocks_of, by_hand, par
from tests.snapshots import differences, model_state
from tests.tiny_hosts import UNETS, run_unet, sd_pipeline, unet_inputs

TRANSFORMERS = ["pixart-alpha", "sd3", "flux", "hunyuan-dit", "z-image"]


def calls_of(model, name):
    """Notes every call of the first convolution or linear layer in a submodule from now on."""
    seen = []
    layers = (m for m in model.get_submodule(name).modules() if isinstance(m, nn.Conv2d | nn.Linear))
    next(layers).register_forward_hook(lambda *a: seen.append(1))
    return seen


@pytest.mark.parametrize("name", UNETS)
def test_the_whole_output_is_a_line_and_no_layer_runs(name):
    """Catches a model that runs although its output is forecast, and a slope taken from the wrong calls."""
    unet, inputs = UNETS[name](), unet_inputs()
    stock, ran = run_unet(unet, **inputs), calls_of(unet, "down_blocks.0")
    with attach(unet, par(unet, {"output": [2, 3]})):
        outputs = run_unet(unet, **inputs)
    torch.testing.assert_close(outputs[2], 2 * stock[1] - stock[0])
    torch.testing.assert_close(outputs[3], 3 * stock[1] - 2 * stock[0])
    assert torch.equal(outputs[:2], stock[:2]) and len(ran) == 2


def test_slope_zero_holds():
    """Catches a slope that the schedule names and nobody reads."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    with attach(unet, par(unet, {"output": [2, 3]}, slope=0.0)):
        outputs = run_unet(unet, **inputs)
    assert torch.equal(outputs[2], outputs[1]) and torch.equal(outputs[3], outputs[1])


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
def test_cutting_a_unet_where_nothing_changes_changes_nothing(name, kept):
    """Catches a cut that leaves out a skip connection that the last layers read, or forecasts the wrong feature."""
    unet, inputs = UNETS[name](), unet_inputs()
    sample = inputs.pop("sample")
    with torch.no_grad(), attach(unet, par(unet, {f"deep.{kept}": [2, 3]}, slope=0.0)):
        ran = calls_of(unet, "mid_block")
        # The same input at times that the model hardly tells apart: what is held is what would have run.
        unet.time_embedding.linear_2.weight.zero_()
        outputs = [unet(sample, torch.tensor(time), **inputs).sample for time in (900, 700, 500, 300)]
    assert len(ran) == 2
    for output in outputs[2:]:
        torch.testing.assert_close(output, outputs[1])


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_blocks_are_skipped_by_their_change(name):
    """Catches a block that runs, a block that returns its input unchanged, and a lost text stream."""
    is_unet = name in UNETS
    model = UNETS[name]() if is_unet else tiny_transformers.build(name)

    def run():
        return run_unet(model, **unet_inputs()) if is_unet else tiny_transformers.run(name, model)

    stock, block = run(), blocks_of(model)[0]
    ran = calls_of(model, block)
    with attach(model, par(model, {block: [2, 3]})):
        outputs = run()
    assert len(ran) == 2 and torch.equal(outputs[:2], stock[:2])
    assert not torch.equal(outputs[2], stock[2])
    with attach(model, par(model, {block: [2, 3]}, slope=0.0)):
        held = run()
    assert (outputs[2] - stock[2]).norm() < 0.5 * stock[2].norm() and not torch.equal(held[2], outputs[2])


@pytest.mark.parametrize("holder", ["deep.1", "output"])
def test_a_block_is_forecast_from_the_calls_that_it_ran_in(holder):
    """Catches a call in which a block lies in a part that is left out, taken for one that gave a result of it."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    name = next(block for block in blocks_of(unet) if block.startswith("mid_block"))
    changes = []
    with attach(unet, par(unet, {holder: [2], name: [3]})):
        hook = unet.get_submodule(name).register_forward_hook(lambda _, args, y: changes.append(y - args[0]))
        run_unet(unet, **inputs)
        hook.remove()
        lines = str(report(unet)).splitlines()
    assert len(changes) == 3
    torch.testing.assert_close(changes[2], changes[1] + 2 * (changes[1] - changes[0]))
    assert f"  {name}: skipped in 2 of 4 calls" in lines


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("inner", [TurboProcessor(0.5, scope="block"), TurboProcessor(0.5)], ids=["block", "attention"])
def test_merging_and_skipping_compose(name, inner):
    """Catches a change that is remembered of the short sequence, and a block that is shortened though it is skipped."""
    is_unet = name in UNETS
    model = UNETS[name]() if is_unet else tiny_transformers.build(name)

    def run():
        times = (900, 700, 500, 300)
        return run_unet(model, times, **unet_inputs()) if is_unet else tiny_transformers.run(name, model, times)

    stock = run()
    with attach(model, par(model, {block: [3] for block in blocks_of(model)}, inner=inner)):
        both = run()
        assert any(layer.num_reduced for layer in report(model).layers)
    with attach(model, inner):
        merged = run()
    assert torch.equal(both[:3], merged[:3]) and not torch.equal(both[3], merged[3])
    assert (both[3] - stock[3]).norm() < 0.5 * stock[3].norm()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_a_budget_of_one_changes_no_bit(name):
    """Catches a gate or a merge that is there although nothing may be saved."""
    is_unet = name in UNETS
    model = UNETS[name]() if is_unet else tiny_transformers.build(name)

    def run():
        return run_unet(model, **unet_inputs()) if is_unet else tiny_transformers.run(name, model)

    stock = run()
    with attach(model, PARProcessor(budget=1.0)):
        assert torch.equal(run(), stock)


def test_detach_restores_every_object_also_after_an_exception():
    """Catches a forward, hook or value that stays behind."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    skips = {"output": [3], "deep.3": [2], blocks_of(unet)[0]: [2, 3]}
    stock, before = run_unet(unet, **inputs), model_state(unet)
    attachment = attach(unet, par(unet, skips, inner="turbo"))
    run_unet(unet, **inputs)
    with pytest.raises(RuntimeError):
        run_unet(unet, **inputs | {"encoder_hidden_states": torch.zeros(2, 6, 5)})
    again = run_unet(unet, **inputs)
    attachment.detach()
    assert differences(before, model_state(unet)) == []
    assert torch.equal(run_unet(unet, **inputs), stock) and not torch.equal(again, stock)


def test_a_forward_placed_later_survives_ours():
    """Catches a detach that takes off what another library put over the gate."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    stock = run_unet(unet, **inputs)
    attachment = attach(unet, par(unet, {"output": [2, 3]}))
    gate, seen = unet.forward, []

    def later(*args, **kwargs):
        seen.append(1)
        return gate(*args, **kwargs)

    unet.forward = later
    attachment.detach()
    assert torch.equal(run_unet(unet, **inputs), stock) and len(seen) == 4 and unet.forward is later
    del unet.forward


def test_runs_share_nothing():
    """Catches results that outlive their run, batches and sizes that see each other's, and halves that are mixed."""
    unet = UNETS["sd15"]()
    small, wide = unet_inputs(), unet_inputs(batch=3, size=(18, 26))
    with attach(unet, par(unet, {"output": [3], "deep.3": [2]})):
        first, other, second = run_unet(unet, **small), run_unet(unet, **wide), run_unet(unet, **small)
        assert torch.equal(first, second)
    with attach(unet, par(unet, {"output": [3], "deep.3": [2]})):
        assert torch.equal(run_unet(unet, **wide), other)


def test_separate_calls_for_guidance_have_memories_of_their_own():
    """Catches a forecast of the conditional call from the unconditional one."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    text = inputs.pop("encoder_hidden_states")
    halves = [text[:1].expand(2, -1, -1).clone(), text[1:].expand(2, -1, -1).clone()]
    processor = par(unet, {"output": [2, 3]})
    alone = []
    for half in halves:
        with attach(unet, processor):
            alone.append(run_unet(unet, encoder_hidden_states=half, **inputs))
    sample = inputs.pop("sample")
    with torch.no_grad(), attach(unet, processor):
        for step, time in enumerate((900, 700, 500, 300)):
            x = sample * (1 - 0.05 * step)
            for half, expected in zip(halves, alone, strict=True):
                output = unet(x, torch.tensor(time), encoder_hidden_states=half, **inputs).sample
                torch.testing.assert_close(output, expected[step])


def test_another_form_of_result_is_not_forecast():
    """Catches a tuple given to a caller who asked for an output object."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    sample = inputs.pop("sample")
    with torch.no_grad(), attach(unet, par(unet, {"output": [2, 3]})):
        for time in (900, 700):
            unet(sample, torch.tensor(time), **inputs)
        assert isinstance(unet(sample, torch.tensor(500), **inputs, return_dict=False), tuple)


def test_a_threshold_runs_what_was_forecast_badly():
    """Catches a threshold that is never looked at."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    times = (900, 800, 700, 600, 500)
    file = by_hand(unet, {"output": [3, 4]}, tuple(map(float, times)))
    counts = []
    for threshold in (None, 1e9, 0.0):
        with attach(unet, PARProcessor(budget=0.5, schedule=file, inner=None, threshold=threshold)):
            run_unet(unet, times, **inputs)
            counts.append(attachments(unet)[0].skipped_units["output"].num_skipped)
    assert counts == [2, 2, 0]


@pytest.fixture
def pipe():
    """A stock pipeline that prints nothing."""
    pipe = sd_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _file(pipe, steps, skips):
    pipe.scheduler.set_timesteps(steps)
    return by_hand(pipe.unet, skips, tuple(map(float, pipe.scheduler.timesteps)))


def _draw(pipe, steps=6, **given):
    generator = torch.Generator().manual_seed(0)
    return pipe("a circle", num_inference_steps=steps, generator=generator, output_type="pt", **given).images


def test_a_pipeline_forgets_at_the_end_of_a_run(pipe):
    """Catches memory that waits for a next run, and a second run that differs."""
    stock = _draw(pipe)
    pipe.set_attn_processor(PARProcessor(budget=0.5, schedule=_file(pipe, 6, {"output": [2, 4], "deep.2": [3]})))
    first, second = _draw(pipe), _draw(pipe)
    assert torch.equal(first, second) and not torch.equal(first, stock)
    assert report(pipe).remembered_bytes == 0 and report(pipe).most_remembered_bytes > 0
    pipe.reset_attn_processor()
    assert torch.equal(_draw(pipe), stock)


def test_a_run_of_other_steps_is_told_and_not_skipped(pipe):
    """Catches a schedule that is laid over a run that it was not made for, or one left out in silence."""
    stock = _draw(pipe, steps=5)
    pipe.set_attn_processor(PARProcessor(budget=0.5, schedule=_file(pipe, 6, {"output": [2, 4]}), inner=None))
    with pytest.warns(NoEffectWarning, match="nothing is skipped in this run: the schedules are for 6 steps"):
        assert torch.equal(_draw(pipe, steps=5), stock)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_scheduler_that_calls_twice_per_step_is_followed_call_by_call(pipe):
    """Catches a schedule that is looked up by time alone: both calls of a step would share an entry."""
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    file = _file(pipe, 4, {"output": [3, 5]})
    assert len(file.schedules[0].times) == 7
    pipe.set_attn_processor(PARProcessor(budget=0.5, schedule=file, inner=None))
    _draw(pipe, steps=4)
    stats = attachments(pipe)[0].skipped_units["output"]
    assert (stats.num_run, stats.num_skipped) == (5, 2)


def test_image_to_image_starts_late_and_forecasts_from_what_it_has(pipe):
    """Catches a forecast of the first calls of a late start, which have nothing behind them."""
    late = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    late.set_progress_bar_config(disable=True)
    file = _file(pipe, 6, {"output": [2, 3, 5]})
    late.set_attn_processor(PARProcessor(budget=0.5, schedule=file, inner=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        _draw(late, image=torch.rand(1, 3, 32, 32), strength=0.67)
    stats = attachments(late)[0].skipped_units["output"]
    assert (stats.num_run, stats.num_skipped) == (3, 1)


def test_steps_that_leave_merging_out_are_counted_as_full_ones(pipe):
    """Catches a report whose layers never run, and whose savings leave out the steps in which nothing is merged."""
    inner = TurboProcessor(0.5, restore="copy")
    file = _file(pipe, 6, {"output": [2, 4], "merging": [0, 1, 3]})
    pipe.set_attn_processor(PARProcessor(budget=0.5, schedule=file, inner=inner))
    _draw(pipe)
    rows = [row for row in report(pipe).layers if row.status == "reduced"]
    assert {(row.num_full, row.num_reduced) for row in rows} == {(3, 1)}
