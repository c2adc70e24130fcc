"""Routes that leave whole calls out: found without a model, and followed by real pipelines of four classes."""

from __future__ import annotations

import itertools

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
from gen_turbo.training.route import RouteSearch, weights_of
from gen_turbo.training.sampled import effects, sampling
from gen_turbo.training.schedule import BRANCH, WHOLE, by_branch
from gen_turbo.training.schedule_file import ScheduleFile, probe_of
from tests import tiny_pipelines, tiny_transformers
from tests.snapshots import differences, model_state
from tests.tiny_family import NUM_TEXT, random
from tests.tiny_hosts import sdxl_unet

STEPS = 10


def curves(num_calls=16, size=40):
    """Results of a call that change smoothly, (T, size), and what a sampler makes of them."""
    time = np.linspace(0, 1, num_calls)[:, None]
    shape = np.random.default_rng(0)
    values = sum(shape.normal(size=(1, size)) * np.sin(time * freq + shape.normal()) for freq in (1.0, 2.0, 3.0, 5.0))
    return values, np.linspace(0.5, 1.5, num_calls)


def rough(values, effect):
    """The same with results that no earlier ones tell, the fewer the later."""
    count = len(effect)
    beside = np.random.default_rng(1).normal(size=(count, 6)) * np.linspace(0.3, 0.02, count)[:, None]
    return np.concatenate([values, beside], 1), effect


def made_by(weights, runs, parts, effect, narrow=()):
    """What the end is off by where each branch of a result, of parts (T, k, size), is made by its own weights."""
    num_branches, own = parts.shape[1], {}
    off = np.zeros(parts.shape[2])
    for call in range(len(effect)):
        if call in runs:
            own[call] = [parts[call, branch] for branch in range(num_branches)]
        known = list(reversed(own.values()))
        branches = by_branch(weights.get(call, ((1.0,),) * num_branches))
        if call in narrow:
            own[call][0] = sum(w * result[0] for w, result in zip(branches[0][1:], known[1:], strict=False))
            branches = ((1.0,), *branches[1:])
        made = [sum(w * r[b] for w, r in zip(own_w, known, strict=False)) for b, own_w in enumerate(branches)]
        off = off + effect[call] * (sum(made) - parts[call].sum(0))
    return float(off @ off)


def stock_weights(route, values, effect):
    """Weights fitted to results of stock alone, and the error that they leave."""
    stacked = np.stack([*values, *values[list(route.runs)]])
    weights, off = weights_of(route.runs, stacked @ stacked.T, effect, len(effect))
    return weights, float(off @ stacked @ stacked.T @ off)


def search_of(values, effect, felt=0.1):
    """A search over one run; by default the model hardly feels errors."""
    return RouteSearch(values @ values.T, effect, np.ones(len(effect)), felt)


def test_a_route_is_what_weights_make_of_it():
    """Catches weights that are laid over other results than those they were fitted to, a correction left out, and a
    search that counts another error than they leave.
    """
    values, effect = rough(*curves())
    # What the model feels between is no part of what the weights do.
    search = search_of(values, effect, 0.0)
    route = search.best(5)
    assert len(route.runs) == 5 and route.runs[0] == 0
    weights, left = stock_weights(route, values, effect)
    plain = {call: weight for call, weight in weights.items() if call not in route.runs}
    error = made_by(weights, route.runs, values[:, None], effect)
    assert error < 0.2 * made_by(plain, route.runs, values[:, None], effect)
    # Weights also undo what earlier gaps have left, which the search counts as lost.
    assert error == pytest.approx(left, rel=0.02) and 0.2 * route.error < error < route.error
    even = search.route([0, 3, 7, 11, 15])
    assert route.error < even.error


@pytest.mark.parametrize("is_to_end", [False, True])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_route_is_the_best_of_all_of_its_length(count, is_to_end):
    """Catches a search that ends in a neighbourhood, a gap priced without the runs before it, a last call moved."""
    search = search_of(*rough(*curves(11)))
    every = [search.route([0, *others]) for others in itertools.combinations(range(1, 11), count - 1)]
    every = [route for route in every if not is_to_end or route.runs[-1] == 10]
    least, best = min(route.error for route in every), search.best(count, is_to_end=is_to_end)
    far = 0.8 if is_to_end else 0.5
    assert best.error <= 1.02 * least < far * np.median([route.error for route in every])
    assert len(best.runs) == count and (best.runs[-1] == 10 or not is_to_end)


def test_fewer_calls_lose_more():
    """Catches a search that stops early or moves calls for the worse."""
    search = search_of(*curves())
    errors = [search.best(count).error for count in (12, 9, 6, 3)]
    assert errors == sorted(errors) and errors[0] < 1e-3 * errors[-1]


def feeling(values, effect, runs, weights, end):
    """What a model gives at the calls that run, that feels how far it was led astray, and how far that is at `end`."""
    mixing = np.random.default_rng(2).normal(size=(values.shape[1],) * 2) / values.shape[1]
    off, own = np.zeros(values.shape[1]), {}
    for call in range(end):
        if call in runs:
            own[call] = values[call] + (3 * off + 20 * mixing @ off) / np.abs(effect).sum()
        known = [own[run] for run in reversed(own)]
        off = off + effect[call] * (
            sum(w * k for w, k in zip(weights.get(call, (1.0,)), known, strict=False)) - values[call]
        )
    return own, float(off @ off)


def test_weights_fitted_to_own_runs_know_what_the_model_makes_of_errors():
    """Catches weights fitted to results of stock alone, to results of other calls, and errors before that are lost."""
    values, effect = rough(*curves())
    route = search_of(values, effect, 1.0).best(5)
    weights = {}
    for number, following in enumerate([*route.runs[1:], len(effect)]):
        own, _ = feeling(values, effect, route.runs, weights, route.runs[number] + 1)
        stacked = np.stack([*values, *own.values()])
        weights, off = weights_of(route.runs[: number + 1], stacked @ stacked.T, effect, following)
    fitted = feeling(values, effect, route.runs, weights, len(effect))[1]
    assert off @ stacked @ stacked.T @ off == pytest.approx(fitted, rel=1e-3)
    of_stock = stock_weights(route, values, effect)[0]
    assert fitted < 0.5 * feeling(values, effect, route.runs, of_stock, len(effect))[1]


def test_branches_have_weights_of_their_own():
    """Catches weights of one branch on the other, a forecast of a branch that later weights do not know of, and what a
    branch that is left out would have added.
    """
    values, effect = rough(*curves())
    # Not the same at any time, so that weights of one are wrong for the other.
    parts = np.stack([-2 * values, 3 * (0.4 * values[::-1] + 1.0)], 1)
    guided, runs, count = parts.sum(1), (0, 2, 5, 9, 13), len(effect)

    def products(own):
        stacked = np.stack([*guided, *own])
        return stacked @ stacked.T

    together, off = weights_of(runs, products(guided[list(runs)]), effect, count)
    apart, nearer = weights_of(runs, products(parts[list(runs)].reshape(10, -1)), effect, count, 2)
    errors = [made_by(together, runs, guided[:, None], effect), made_by(apart, runs, parts, effect)]
    assert errors[1] < 0.5 * errors[0] and {len(by_branch(w)) for w in apart.values()} == {2}
    assert errors == pytest.approx(
        [off @ products(guided[list(runs)]) @ off, nearer @ products(parts[list(runs)].reshape(10, -1)) @ nearer],
        rel=1e-2,
    )
    ran = np.concatenate([parts[list(runs[:-1])].reshape(8, -1), parts[runs[-1], 1:]])
    narrow, off = weights_of(runs, products(ran), effect, count, 2, runs[-1:])
    assert narrow[runs[-1]][0][0] == 0 and len(narrow[runs[-1]][0]) > 1
    error = made_by(narrow, runs, parts, effect, runs[-1:])
    assert error == pytest.approx(off @ products(ran) @ off, rel=1e-2)
    assert errors[1] < error


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
