"""What a run remembers is gone when the run is, however it ended."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, report
from tests.tiny_hosts import picture, sd_pipeline


def _raise(pipe, step, time, kwargs):
    if step == 4:
        raise KeyboardInterrupt
    return {}


def _interrupt(pipe, step, time, kwargs):
    pipe._interrupt = step == 4
    return {}


@pytest.mark.parametrize("stop", [_raise, _interrupt])
def test_a_run_that_is_stopped_leaves_nothing(stop):
    """Catches residuals that wait for a next run, which may never come, and text that is kept alive for them."""
    pipe = sd_pipeline()
    with attach(pipe, TurboProcessor(0.5)):
        alone = picture(pipe, steps=8)
        try:
            picture(pipe, steps=8, callback_on_step_end=stop)
        except KeyboardInterrupt:
            pass
        told = report(pipe)
        assert told.remembered_bytes == 0 and told.sites[0].num_reduced > 0
        assert torch.equal(picture(pipe, steps=8), alone)
