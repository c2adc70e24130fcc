"""Routes that leave whole calls out, followed by real pipelines of four classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import nn

from gen_turbo import PARProcessor, attach, report
from gen_turbo.api import attachments, denoisers
from gen_turbo.training.calibrate_route import Fits, num_images, record
from gen_turbo.training.sampled import effects, sampling
from gen_turbo.training.schedule import BRANCH, WHOLE
from gen_turbo.training.schedule_file import ScheduleFile, probe_of
from tests import tiny_pipelines, tiny_transformers
from tests.snapshots import differences, model_state
from tests.tiny_family import NUM_TEXT, random
from tests.tiny_hosts import sdxl_unet

STEPS = 10


def sdxl():
    """SDXL: guidance in one batch, sizes and pooled text beside it."""
    unet = sdxl_unet()
    pipe = StableDiffusionXLPipeline(
        tiny_pipelines._autoencoder(), None, None, None, None, unet, DDIMScheduler(clip_sample=False)
    )
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 6 * 8
    texts = {"prompt_embeds": random(1, 6, width), "negative_prompt_embeds": random(1, 6, width, seed=3)}
    pooled = {"pooled_prompt_embeds": random(1, pooled), "negative_pooled_prompt_embeds": random(1, pooled, seed=3)}
    return pipe, {**texts, **pooled, "latents": random(1, 4, 16, 16)}


def wan():
    """Wan: a video, and guidance that calls the model twice in every step."""
    model = tiny_transformers.build("wan")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, model)
    texts = {"prompt_embeds": random(1, NUM_TEXT, 32), "negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3)}
    return pipe, {**texts, "latents": random(1, 4, 2, 8, 8), "num_frames": 5}


PIPELINES = {"sdxl": sdxl, "flux": tiny_pipelines.flux, "sd3": tiny_pipelines.sd3, "wan": wan}


@pytest.fixture(params=PIPELINES)
def drawn(request):
    """A pipeline, its name and what draws with it."""
    pipe, call = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    side = {"height": 64, "width": 64} if request.param == "wan" else {"height": 32, "width": 32}

    def draw(index: int = 0) -> torch.Tensor:
        shifted = {**call, "latents": call["latents"] + 0.1 * index}
        done = pipe(**shifted, **side, num_inference_steps=STEPS, output_type="latent")
        return torch.as_tensor(done.frames if hasattr(done, "frames") else done.images)

    return request.param, pipe, draw


def narrowed(fits, attached, reported):
    """Fits a schedule whose last call leaves the unconditional branch out, and runs it."""
    [[more]] = [routes[:1] for routes in fits.recorded.schedules((0.38,), saved=0.5)]
    schedule, near = fits.fitted(more, is_narrow=True)
    assert schedule.skips[BRANCH] == {schedule.ran_before(WHOLE, STEPS)[0]}
    with attached(schedule):
        assert reported().skipped[BRANCH] == (1, 3)
    assert near == pytest.approx(sum(fits.distance(schedule, index, ()) for index in (0, 1)) / 2, rel=1e-3)


def merged_late(fits, probe, pipe, draws_stock):
    """The layers that merge by a schedule of which seven of ten calls run, the last of them merged."""
    late = fits.fitted(fits.recorded.schedules((0.7,), late=0.3)[0][0])[0]
    assert late.cost == pytest.approx(0.63) and late.ran_before(WHOLE, STEPS)[0] == STEPS - 1
    file = ScheduleFile(type(denoisers(pipe)[1][0]).__name__, probe, _name(pipe), (late,))
    with attach(pipe, PARProcessor(budget=0.9, schedule=file)):
        assert not draws_stock()
        return [layer for layer in report(pipe).layers if layer.num_tokens]


def test_every_class_of_pipeline_is_calibrated(drawn):
    """Catches guidance branches taken for steps, a file that its run does not match, calls uncounted or made again."""
    name, pipe, draw = drawn
    models = denoisers(pipe)[1]
    calls, told = [], []
    inside = next(module for module in models[0].modules() if isinstance(module, nn.Linear | nn.Conv2d))
    handle = inside.register_forward_hook(lambda *given: calls.append(1))
    stock = draw()
    per_image = len(calls)
    calls.clear()
    recorded = record(pipe, models, draw, 2, told.append)
    assert len(calls) <= per_image * num_images(STEPS, 2, []) + 1e-6 and told
    before = model_state(models[0])
    assert "step" not in vars(pipe.scheduler) and len(recorded.runs[0].guided) == STEPS
    many, few = (routes[0] for routes in recorded.schedules((0.7, 0.4)))
    assert [round(STEPS * schedule.cost) for schedule in (many, few)] == [7, 4]
    # Guidance is 5 and 7 where it is in one batch; Flux has none, and Wan calls its model for each branch.
    assert recorded.shares == pytest.approx({"sdxl": (-4.0, 5.0), "sd3": (-6.0, 7.0)}.get(name, (1.0,)), rel=1e-3)
    probe = tuple(probe_of(models[0]).tolist())

    def attached(schedule):
        file = ScheduleFile(type(models[0]).__name__, probe, _name(pipe), (schedule,))
        return attach(pipe, PARProcessor(budget=0.9, schedule=file, inner=None))

    def follow(schedule, index, known, last):
        with sampling(pipe, models, known, last=last) as run, attached(schedule):
            draw(index)
        return run

    calls.clear()

    def distance(schedule, index, known):
        with sampling(pipe, models, known), attached(schedule):
            return -float((draw(index) - recorded.images[index]).norm())

    fits = Fits(recorded, follow, distance)
    fitted, near = fits.fitted(few)
    # Every call of a run once, whatever was run before is known.
    assert len(calls) * STEPS == 2 * 4 * per_image and 6 <= len(fitted.weights[WHOLE]) < STEPS
    assert "step" not in vars(pipe.scheduler) and differences(before, model_state(models[0])) == []
    # What replays give, a run gives.
    assert near == pytest.approx(sum(distance(fitted, index, ()) for index in (0, 1)) / 2, rel=1e-4)
    calls.clear()
    # What comes before a run that is moved is known, and so is the schedule that it was moved in.
    most = num_images(STEPS, 2, [[few]]) - num_images(STEPS, 2, []) - 2 * few.cost
    assert fits.best([few])[1] >= near and 0 < len(calls) <= per_image * most + 1e-6
    distances = []
    for schedule in (fits.fitted(many)[0], fitted):
        with attached(schedule):
            own = draw()
            stats = attachments(pipe)[0].skipped_units[WHOLE]
        assert stats.num_skipped * STEPS == (STEPS - round(STEPS * schedule.cost)) * per_image
        distances.append(float((own - stock).norm()))
    assert 0 < distances[0] < distances[1] < 0.5 * float(stock.norm())
    if len(recorded.shares) == 2:
        narrowed(fits, attached, lambda: draw() is None or report(pipe))
    assert recorded.schedules((0.7,), saved=0.5) == []
    reached = merged_late(fits, probe, pipe, lambda: torch.equal(draw(), stock))
    # In each branch that is called for itself.
    assert reached and {layer.num_reduced for layer in reached} == {per_image // STEPS}
    assert torch.equal(draw(), stock) and differences(before, model_state(models[0])) == []
    handle.remove()


def _name(pipe):
    return type(pipe.scheduler).__name__


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, DDIMScheduler], ids=lambda kind: kind.__name__)
def test_effects_are_what_the_scheduler_does(scheduler):
    """Catches effects of another scheduler's state, or of the wrong step."""
    pipe, call = tiny_pipelines.sd3() if scheduler is FlowMatchEulerDiscreteScheduler else tiny_pipelines.pixart()
    pipe.set_progress_bar_config(disable=True)
    if scheduler is DDIMScheduler:
        # What is clipped is no longer linear.
        pipe.scheduler = DDIMScheduler(clip_sample=False)

    def draw() -> None:
        tiny_pipelines.latents_of(pipe, call, 6)

    with sampling(pipe, denoisers(pipe)[1]) as run:
        draw()
    effect = effects(run, type(pipe.scheduler))
    wrong = run.guided[3] + 0.5
    with sampling(pipe, denoisers(pipe)[1], run.raw, (3, wrong)) as other:
        draw()
    assert float((other.final - run.final).mean()) == pytest.approx(0.5 * effect[3], rel=1e-2)
    if scheduler is FlowMatchEulerDiscreteScheduler:
        sigmas = pipe.scheduler.sigmas.double().numpy()
        assert np.allclose(effect, np.diff(sigmas), rtol=1e-2)
