"""Whole calls left out by weights of their own or by the generic rule, on pipelines, bare models and unknown ones."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DModel, UniPCMultistepScheduler

from gen_turbo import PARProcessor, TurboProcessor, attach, load_pipeline, report
from gen_turbo.api import attachments
from gen_turbo.engine.denoiser import NoEffectWarning
from gen_turbo.engine.route import Route
from gen_turbo.training.generic import Generic
from gen_turbo.training.schedule import MERGING, WHOLE, Schedule
from gen_turbo.training.schedule_file import ScheduleFile, probe_of, read, write
from tests import tiny_transformers
from tests.schedules import TIMES
from tests.snapshots import differences, model_state
from tests.tiny_hosts import UNETS, run_unet, sd_pipeline, unet_inputs

WEIGHTS = {2: (1.5, -0.6), 3: (0.7, 0.5, -0.3)}
"""Of the third call, which is left out, and of the last, which runs."""


def file_of(model, skips, weights, times=TIMES, inner=None, scheduler="DDIMScheduler"):
    """A file with one schedule of half the cost."""
    frozen = {unit: frozenset(calls) for unit, calls in skips.items()}
    schedule = Schedule(times, frozen, cost=0.5, weights=weights, inner=inner)
    return ScheduleFile(type(model).__name__, tuple(probe_of(model).tolist()), scheduler, (schedule,))


def both(name):
    """A model and what calls it four times."""
    if name in UNETS:
        model = UNETS[name]()
        return model, lambda: run_unet(model, **unet_inputs())
    model = tiny_transformers.build(name)
    return model, lambda: tiny_transformers.run(name, model)


@pytest.mark.parametrize("name", ["sd15", "sd3", "z-image"])
def test_each_call_has_its_weights(name):
    """Catches a forecast by the slope, a correction that is remembered as a result, one made of forecasts, and weights
    brought to a sum of 1.
    """
    model, run = both(name)
    stock = run()
    with attach(model, PARProcessor(schedule=file_of(model, {WHOLE: [2]}, {WHOLE: WEIGHTS}), inner=None)):
        own = run()
    assert torch.equal(own[:2], stock[:2])
    torch.testing.assert_close(own[2], 1.5 * stock[1] - 0.6 * stock[0])
    torch.testing.assert_close(own[3], 0.7 * stock[3] + 0.5 * stock[1] - 0.3 * stock[0])


def test_results_are_kept_for_corrections_behind_the_last_skip():
    """Catches results that are kept for forecasts alone, without which a correction is left out in silence."""
    model, run = both("sd3")
    stock = run()
    weights = {WHOLE: {1: (0.9,), 3: (0.7, 0.5, -0.3)}}
    with attach(model, PARProcessor(schedule=file_of(model, {WHOLE: [1]}, weights), inner=None)):
        own = run()
    torch.testing.assert_close(own[1], 0.9 * stock[0])
    torch.testing.assert_close(own[3], 0.7 * stock[3] + 0.5 * stock[2] - 0.3 * stock[0])


def test_half_precision_is_weighed_in_single():
    """Catches weights that add up in half precision, where a difference of large results is lost."""
    from gen_turbo.engine.guided import combined

    parts = [torch.full((4,), 1000.5, dtype=torch.float16), torch.full((4,), 1000.0, dtype=torch.float16)]
    assert combined(parts, (3.0, -2.0)).tolist() == [1001.5] * 4


def test_weights_come_back_from_a_file_and_odd_ones_are_refused(tmp_path):
    """Catches weights that are written and not read, and a file whose weights are no numbers, none or too many."""
    unet = UNETS["sd15"]()
    file = file_of(unet, {WHOLE: [2]}, {WHOLE: WEIGHTS})
    write(tmp_path / "s.yaml", file, "a test")
    assert read(tmp_path / "s.yaml").schedules == file.schedules
    text = (tmp_path / "s.yaml").read_text()
    for odd in ("[.inf, 1.0]", "[.nan, 1.0]", "[]", "[1.0, 0.0, 0.0, 0.0, 0.0]", "2"):
        (tmp_path / "odd.yaml").write_text(text.replace("[1.5, -0.6]", odd))
        with pytest.raises(ValueError, match="is no schedule"):
            read(tmp_path / "odd.yaml")


def test_steps_left_unmerged():
    """Catches tokens that are merged at calls at which the schedule leaves merging out, and residuals lost there."""
    model, run = both("sd15")
    inner = TurboProcessor(0.5, scope="attention", max_downsample=1, warmup_steps=1, full_every=8)
    with attach(model, inner):
        merged = run()
    stock = run()
    file = file_of(model, {MERGING: [1, 3]}, {}, inner="turbo")
    with attach(model, PARProcessor(schedule=file, inner=inner)):
        own = run()
    assert torch.equal(own[1], stock[1]) and torch.equal(own[3], stock[3])
    assert torch.equal(own[2], merged[2]) and not torch.equal(own[2], stock[2])


@pytest.fixture
def pipe():
    """A stock pipeline that prints nothing."""
    pipe = sd_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=8, **given):
    """One image."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a circle", num_inference_steps=steps, generator=generator, output_type="pt", **given).images


def times_of(pipe, steps=8):
    """The times of a run."""
    pipe.scheduler.set_timesteps(steps)
    return tuple(map(float, pipe.scheduler.timesteps))


def test_weights_are_of_one_scheduler(pipe):
    """Catches corrections for one sampler that are given to another whose times are the same."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    file = file_of(pipe.unet, {WHOLE: [2]}, {WHOLE: WEIGHTS}, times_of(pipe), scheduler="EulerDiscreteScheduler")
    stock = draw(pipe)
    pipe.set_attn_processor(PARProcessor(schedule=file, inner=None))
    with pytest.warns(NoEffectWarning, match="nothing is skipped in this run"):
        assert torch.equal(draw(pipe), stock)


def test_a_late_start_forecasts_by_the_slope(pipe, monkeypatch):
    """Catches weights that are laid over results of calls that the schedule did not count on."""
    late = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    late.set_progress_bar_config(disable=True)
    weights = {WHOLE: {4: (9.0, -8.0), 5: (4.0, -3.0), 6: (5.0, -4.0)}}
    file = file_of(pipe.unet, {WHOLE: [4, 6]}, weights, times_of(pipe))
    late.set_attn_processor(PARProcessor(schedule=file, inner=None))
    seen, weighed = [], Route.forecast_by
    skipping = attachments(late)[0].skipping
    monkeypatch.setattr(Route, "forecast_by", lambda *given: seen.append(weighed(*given)) or seen[-1])
    draw(late, image=torch.rand(1, 3, 32, 32), strength=0.5)
    assert seen == [(2.0, -1.0)] and skipping.stats[WHOLE].num_skipped == 1


def test_the_rule_runs_what_the_budget_allows():
    """Catches a first or last call that is left out, a budget that is passed, even distances, lines of one slope.

    And a line through the first result of all, which at 8 steps and half of the calls costs 21 dB on tiny-dit.
    """
    for steps, budget in ((28, 0.5), (28, 0.34), (50, 0.25), (8, 0.5), (14, 0.5), (4, 0.75)):
        schedule = Generic(budget).schedule([float(steps - step) for step in range(steps)])
        left_out = schedule.skips[WHOLE]
        runs = [call for call in range(steps) if call not in left_out]
        assert runs[0] == 0 and runs[1] == 1 and runs[-1] == steps - 1
        assert len(runs) == int(budget * steps) and schedule.cost == pytest.approx(len(runs) / steps)
        gaps = [after - before for before, after in zip(runs, runs[1:], strict=False)]
        assert max(gaps) > gaps[-1] or len(runs) < 7
        assert (runs[2] == 2) == (len(runs) > 7)
        for call, weights in schedule.weights[WHOLE].items():
            last, before = schedule.ran_before(WHOLE, call)[:2]
            gap = next(run for run in runs if run > call) - last
            reach = 2 / gap * (call - last) / (last - before)
            assert weights == (pytest.approx((1 + reach, -reach)) if before else (1.0,))
    assert Generic(0.5).schedule([3.0, 2.0, 1.0]).skips == {}
    endless = Generic(0.34).schedule(())
    assert [call for call in range(12) if call not in endless.skips[WHOLE]] == [0, 1, 2, 5, 8, 11]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_model_without_a_schedule_follows_the_rule_and_says_so(pipe, caplog):
    """Catches a model that is refused, a warning where nothing is wrong, and a route that does not say what it is."""
    stock = draw(pipe)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "gen_turbo"):
        warnings.simplefilter("error")
        pipe.set_attn_processor(PARProcessor(budget=0.5))
        assert "generic route, not calibrated for this model: about 50% of calls run" in str(report(pipe))
        own = draw(pipe)
    assert not torch.equal(own, stock) and torch.equal(draw(pipe), own)
    assert report(pipe).skipped == {WHOLE: (8, 8)}
    assert report(pipe).notes == ("generic route, not calibrated for this model: 4 of 8 calls of a run left out",)
    assert sum("generic route" in message for message in caplog.messages) == 1
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    draw(pipe, steps=12)
    assert report(pipe).skipped[WHOLE] == (8 + 6, 8 + 6)
    with pytest.warns(NoEffectWarning, match="too few steps for this budget; take at least 4"):
        draw(pipe, steps=3)
    pipe.reset_attn_processor()


def test_too_short_a_run_is_not_sent_to_the_lengths_of_schedules():
    """Catches advice to take a schedule's steps where the rule serves all but too short runs, and a second warning."""
    pipe = load_pipeline("tiny-dit", processor=PARProcessor(budget=0.5))
    with pytest.warns(NoEffectWarning) as told:
        draw(pipe, steps=2)
    # Once: its schedule of 14 steps merges tokens too, which a run of other steps is not to be told.
    assert len(told) == 1
    assert "in this run: it has too few steps for this budget; take at least 4" in str(told[0].message)


def test_a_bare_model_follows_the_rule_by_its_steps():
    """Catches a rule that waits for a length that nobody tells, and runs that see each other's results."""
    unet = UNETS["sd15"]()
    times, inputs = (900, 800, 700, 600, 500, 400), unet_inputs()
    stock = run_unet(unet, times, **inputs)
    with attach(unet, PARProcessor(schedule="generic", budget=0.5, inner=None)):
        first, second = run_unet(unet, times, **inputs), run_unet(unet, times, **inputs)
        assert report(unet).skipped == {WHOLE: (4, 8)}
    assert torch.equal(first, second) and torch.equal(first[:3], stock[:3])
    torch.testing.assert_close(first[3], 2 * stock[2] - stock[1])
    torch.testing.assert_close(first[4], stock[4])


def test_an_unknown_family_leaves_whole_calls_out():
    """Catches a family that must be known for its forward, layers looked for in it, and a trace that stays."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    torch.manual_seed(0)
    unet = UNet2DModel(8, 3, 3, block_out_channels=(32,), layers_per_block=1, **blocks).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="np").images

    stock, before = draw(), model_state(unet)
    with pytest.raises(ValueError, match="UNet2DModel is not supported"):
        attach(pipe, TurboProcessor(0.5))
    with attach(pipe, PARProcessor(budget=0.5)):
        own, again = draw(), draw()
        assert report(pipe).skipped == {WHOLE: (8, 8)} and "generic route" in str(report(pipe))
    assert (own == again).all() and not (own == stock).all() and (draw() == stock).all()
    assert differences(before, model_state(unet)) == []
    with pytest.raises(ValueError, match="Linear is not supported"):
        attach(torch.nn.Linear(1, 1), PARProcessor(budget=0.5))
