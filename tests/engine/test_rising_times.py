"""Times that rise, as in DDIM inversion: a bare model says that it reduces nothing, and what it advises works."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, report
from gen_turbo.api import NoEffectWarning
from tests.engine.families import family
from tests.tiny_hosts import run_unet, sd_pipeline, unet_inputs

RISING = (100, 300, 500, 700)


def sites(target) -> list[tuple[int, int]]:
    """Full and reduced calls of each layer that is reached."""
    return [(row.num_full, row.num_reduced) for row in report(target).layers if row.status == "reduced"]


@pytest.mark.parametrize("settings", [{}, {"scope": "block"}])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_bare_model_says_that_nothing_is_reduced(name, settings):
    """Catches an inversion of fifty steps at the price of the stock model, without a word."""
    model, run = family(name)
    stock = run(times=RISING)
    with attach(model, TurboProcessor(0.4, **settings)):
        with pytest.warns(NoEffectWarning, match="attach to a pipeline that holds the scheduler") as told:
            assert torch.equal(run(times=RISING), stock)
        # Once for a series of them.
        assert len(told) == 1


@pytest.mark.parametrize(
    ("times", "settings"),
    [
        (RISING, {"restore": "copy"}),
        (RISING[::-1] * 3, {}),
        ((500, 300, 600, 400, 700, 500), {}),
        ((100, 500, 100), {}),
    ],
)
def test_no_false_alarm(times, settings):
    """Catches the warning where layers are reduced, and where runs one after the other begin later."""
    model, run = family("sd15")
    with attach(model, TurboProcessor(0.4, **settings)), warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        run(times=times)


def test_attached_to_the_pipeline_the_same_calls_are_reduced():
    """Catches an advice that does not help: the user's own loop on the model of a pipeline, with its scheduler."""
    pipe, inputs = sd_pipeline(), unet_inputs()
    pipe.scheduler = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(8)
    times = tuple(pipe.scheduler.timesteps.tolist())
    assert times == tuple(sorted(times))
    with attach(pipe, TurboProcessor(0.4)), warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        run_unet(pipe.unet, times, **inputs)
        found = sites(pipe)
    assert found and all(full + reduced == 8 and reduced > 3 for full, reduced in found)
