"""Memory dies with runs of schedulers whose times are negative, repeated or rising, also when the user stops them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, report
from tests.tiny_hosts import image, run_unet, sd15_unet, sd_pipeline, unet_inputs

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SCHEDULERS = ["EDMEuler", "HeunDiscrete", "KDPM2AncestralDiscrete", "DDIMInverse"]


def _stop(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if step == 4:
        raise KeyboardInterrupt
    return kwargs


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_ends_with_its_last_call_or_with_ctrl_c(name):
    """Catches a last call that is not known as such, a false warning, and what a stopped run leaves to the next."""
    pipe, kind = sd_pipeline(), getattr(diffusers, f"{name}Scheduler")
    pipe.scheduler = kind() if name == "EDMEuler" else kind.from_config(pipe.scheduler.config)
    with attach(pipe, TurboProcessor(0.5)):
        first = image(pipe, steps=9)
        told = report(pipe)
        assert told.remembered_bytes == 0 < told.most_remembered_bytes
        assert all(row.num_reduced >= row.num_full for row in told.layers if row.status == "reduced")
        with pytest.raises(KeyboardInterrupt):
            image(pipe, steps=9, callback_on_step_end=_stop)
        assert report(pipe).remembered_bytes == 0
        assert torch.equal(image(pipe, steps=9), first)


@pytest.mark.parametrize("settings", [{}, {"restore": "copy", "match_every": 0}, {"scope": "block"}])
def test_a_run_that_began_under_inference_mode_does_not_go_on_outside(settings):
    """Catches memory made under inference mode that a training step writes to."""
    unet, inputs = sd15_unet(), unet_inputs()
    call = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    with attach(unet, TurboProcessor(0.5, **settings)):
        with torch.inference_mode():
            for time in (900, 700, 500):
                unet(inputs["sample"], torch.tensor(time), **call)
        unet(inputs["sample"], torch.tensor(300), **call).sample.square().mean().backward()
        with torch.inference_mode():
            unet(inputs["sample"], torch.tensor(200), **call)
        alone = run_unet(unet, **inputs)
    with torch.inference_mode():
        made = sd15_unet()
    with attach(made, TurboProcessor(0.5, **settings)):
        assert torch.equal(run_unet(made, **inputs), alone)
