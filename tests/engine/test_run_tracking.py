"""Whose call it is: runs that share a model, guidance branches, runs that end early, threads and exceptions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from stated import TurboProcessor
from torch import Tensor

from gen_turbo import attach, report
from gen_turbo.api import NoEffectWarning
from tests.tiny_hosts import image, sd_pipeline
from tests.tiny_pipelines import latents_of, sd3

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

KINDS: dict[str, dict[str, object]] = {
    "residual": {},
    "copied": {"restore": "copy", "match_every": 2},
    "block": {"scope": "block"},
}


class Stop(Exception):
    """The user has seen enough."""


def stops_at(last: int) -> Callable[..., dict[str, Any]]:
    """A callback that stops the run at the end of a step."""

    def stop(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise Stop
        return kwargs

    return stop


def photo(seed: int) -> Image.Image:
    """An image to begin from."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def from_photo(pipe: Any, strength: float, steps: int = 8, seed: int = 0, **kwargs: Any) -> Tensor:
    """One run of an image-to-image pipeline."""
    call = {"prompt": "a red circle", "image": photo(seed), "num_inference_steps": steps, "strength": strength}
    generator = torch.Generator().manual_seed(1)
    return torch.from_numpy(pipe(**call, generator=generator, output_type="np", **kwargs).images)


def quiet(pipe: Any) -> Any:
    """The same pipeline without a bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_own_scheduler(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Another pipeline over the same UNet."""
    parts = pipe.components | {"scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
    return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_leaves_nothing_to_the_pipeline_beside_it(kind):
    """Catches runs told apart by their times alone: the later one goes on with what the stopped one remembers."""
    first = sd_pipeline()
    second = with_own_scheduler(first)
    with attach(first.unet, TurboProcessor(0.4, **KINDS[kind])):
        alone = image(second, seed=1, steps=6)
        with pytest.raises(Stop):
            image(first, seed=2, steps=8, callback_on_step_end=stops_at(3))
        assert torch.equal(image(second, seed=1, steps=6), alone)
        with pytest.raises(Stop):
            image(second, seed=2, steps=6, callback_on_step_end=stops_at(1))
        assert torch.equal(image(second, seed=1, steps=6), alone)
        assert report(first).remembered_bytes == 0


def test_a_later_start_after_a_stop():
    """Catches an image-to-image run that begins below the time at which another was stopped, taken for its rest."""
    pipe = quiet(StableDiffusionImg2ImgPipeline.from_pipe(sd_pipeline()))
    with attach(pipe.unet, TurboProcessor(0.4)):
        alone = from_photo(pipe, 0.5)
        with pytest.raises(Stop):
            from_photo(pipe, 1.0, seed=1, callback_on_step_end=stops_at(1))
        assert torch.equal(from_photo(pipe, 0.5), alone)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_short_runs_of_pipelines_made_from_each_other(num_steps):
    """Catches runs of one step that are taken for one long run, for they share model and scheduler."""
    pipe = sd_pipeline()
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    with attach(pipe.unet, TurboProcessor(0.4, restore="copy")):
        alone = image(pipe, steps=6)
        short = from_photo(other, num_steps / 8)
        for _ in range(2):
            assert torch.equal(from_photo(other, num_steps / 8), short)
        assert torch.equal(image(pipe, steps=6), alone) and torch.equal(from_photo(other, num_steps / 8), short)
    assert torch.equal(short, _fresh_short(num_steps))


def _fresh_short(num_steps: int) -> Tensor:
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(sd_pipeline()))
    with attach(other.unet, TurboProcessor(0.4, restore="copy")):
        return from_photo(other, num_steps / 8)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_ends_its_run(strength):
    """Catches an end that is counted from the first time of the scheduler instead of from where the run began."""
    pipe = quiet(StableDiffusionImg2ImgPipeline.from_pipe(sd_pipeline()))
    with attach(pipe, TurboProcessor(0.4, warmup_steps=1)):
        from_photo(pipe, strength, steps=10)
        told = report(pipe)
    assert told.remembered_bytes == 0 < told.most_remembered_bytes


SCHEDULERS = ["Heun", "KDPM2Ancestral", "PNDM", "DPMSolverSinglestep"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_every_order_end_their_runs(name):
    """Catches calls at one time taken for guidance branches or for new runs, and a warning where much was removed."""
    pipe = sd_pipeline()
    pipe.scheduler = getattr(diffusers, f"{name}DiscreteScheduler", None) or getattr(diffusers, f"{name}Scheduler")
    pipe.scheduler = pipe.scheduler.from_config(sd_pipeline().scheduler.config)
    with attach(pipe, TurboProcessor(0.4)):
        first = image(pipe, steps=8)
        told = report(pipe)
        rows = [row for row in told.layers if row.status == "reduced"]
        assert {row.num_full + row.num_reduced for row in rows} == {len(pipe.scheduler.timesteps)}
        assert told.remembered_bytes == 0 and all(row.num_reduced > row.num_full // 2 for row in rows)
        assert torch.equal(image(pipe, steps=8), first)


def drops_guidance(at: int) -> Callable[..., dict[str, Any]]:
    """A callback after which the pipeline calls the model on the conditional half alone."""

    def drop(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return kwargs

    return drop


@pytest.mark.parametrize("at", [2, 4, 6])
def test_guidance_that_is_dropped_in_mid_run(at):
    """Catches a warning of no effect about the few steps after it, and another image the second time."""
    pipe = sd_pipeline()
    names = ["prompt_embeds"]
    with attach(pipe, TurboProcessor(0.4)), warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        call = {"callback_on_step_end": drops_guidance(at), "callback_on_step_end_tensor_inputs": names}
        first = image(pipe, steps=9, **call)
        assert torch.equal(image(pipe, steps=9, **call), first)
        assert report(pipe).most_remembered_bytes > 0


def _interrupts(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 3
    return kwargs


@pytest.mark.parametrize("how", [drops_guidance(4), _interrupts, stops_at(3)], ids=["guidance", "interrupt", "stop"])
def test_memory_dies_with_a_run_that_ends_otherwise(how):
    """Catches residuals that are held between images because no last call came."""
    pipe = sd_pipeline()
    with attach(pipe, TurboProcessor(0.4)):
        try:
            names = ["prompt_embeds"]
            image(pipe, steps=9, callback_on_step_end=how, callback_on_step_end_tensor_inputs=names)
        except Stop:
            pass
        assert report(pipe).remembered_bytes == 0


def test_memory_dies_with_guidance_by_skipped_layers():
    """Catches the branch of SD3's skip-layer guidance, which ends long before its run, held until the next one."""
    pipe, call = sd3()
    quiet(pipe)
    with attach(pipe, TurboProcessor(0.4)):
        for _ in range(2):
            latents_of(pipe, call, 10, skip_guidance_layers=[1], skip_layer_guidance_stop=0.6)
        told = report(pipe)
    assert told.remembered_bytes == 0 < told.most_remembered_bytes
