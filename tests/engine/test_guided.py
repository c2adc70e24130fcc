"""Guidance branches in one batch: weights for each of them, and calls that leave the unconditional one out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from diffusers import DDIMScheduler

from gen_turbo import PARProcessor, TurboProcessor, attach, report
from gen_turbo.api import denoiser
from gen_turbo.training.sampled import parts_of, sampling, shares_of
from gen_turbo.training.schedule import BRANCH, MERGING, WHOLE, Schedule, carried_over
from gen_turbo.training.schedule_file import ScheduleFile, probe_of, read, write
from tests.snapshots import differences, model_state
from tests.tiny_hosts import image, sd_pipeline
from tests.tiny_pipelines import control_pipeline, ip_adapter_pipeline, prompt_image, sd3_with_text
from tests.training.test_routes import sdxl

STEPS, SHARES = 7, (-6.5, 7.5)
SKIPS = {WHOLE: frozenset({3, 5}), BRANCH: frozenset({4})}
WEIGHTS = {
    3: ((1.2, -0.3), (0.9, 0.2, -0.1)),
    4: ((0.0, 0.7, 0.4), (1.1, -0.2)),
    5: ((0.9, 0.1), (1.0,)),
    6: ((0.8, 0.1), (1.1, -0.2)),
}


def _sdxl(folder):
    pipe, call = sdxl()
    pipe.set_progress_bar_config(disable=True)
    fixed = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe, lambda **given: pipe(**{**call, **fixed, "guidance_scale": SHARES[1], **given}).images


def _sd3(folder):
    pipe = sd3_with_text()
    fixed = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent"}

    def draw(**given):
        return pipe("a circle", generator=torch.Generator().manual_seed(0), **fixed, **given).images

    return pipe, draw


def _plain(folder):
    pipe = sd_pipeline()
    return pipe, partial(image, pipe, steps=STEPS)


def _control(folder):
    pipe = control_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe, partial(image, pipe, steps=STEPS, image=prompt_image())


def _ip_adapter(folder):
    pipe = ip_adapter_pipeline(folder)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name="adapter.safetensors")
    return pipe, partial(image, pipe, steps=STEPS, ip_adapter_image=prompt_image())


PIPELINES = {"sd": _plain, "ControlNet": _control, "sdxl": _sdxl, "sd3": _sd3}


@pytest.fixture(params=PIPELINES)
def drawn(request, tmp_path):
    """A pipeline that guides in one batch, and what draws with it."""
    return PIPELINES[request.param](tmp_path)


def followed(pipe, draw, skips=SKIPS, inner=None, text_ratio=0.0, **given):
    """One run by a schedule: what the model and the scheduler were given, and the report."""
    model = denoiser(pipe)
    with sampling(pipe, [model]) as run:
        draw(**given)
    schedule = Schedule(tuple(run.times), skips, cost=0.5, weights={WHOLE: WEIGHTS}, shares=SHARES)
    processor = PARProcessor(schedule=file_of(pipe, schedule), inner=inner, text_ratio=text_ratio)
    with sampling(pipe, [model]) as own, attach(pipe, processor):
        draw(**given)
        said = report(pipe)
    return run, own, said


def test_another_guidance_than_the_schedule_has_is_told():
    """Catches weights of branches that serve every scale in silence, and a warning where the scale is the same."""
    pipe, draw = _plain(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        followed(pipe, draw, guidance_scale=SHARES[1])
    with pytest.warns(UserWarning, match="calibrated at guidance 7.5, and a run has 3"):
        said = followed(pipe, draw, guidance_scale=3.0)[2]
    assert any("guidance 7.5" in note for note in said.notes)


def file_of(pipe, schedule):
    """A file with one schedule for a pipeline."""
    model = denoiser(pipe)
    kind, probe = type(model).__name__, tuple(probe_of(model).tolist())
    return ScheduleFile(kind, probe, type(pipe.scheduler).__name__, (schedule,))


def total(parts):
    """What branches add up to."""
    return torch.from_numpy(sum(parts))


def test_every_branch_has_its_weights(drawn):
    """Catches weights of one branch for both, branches in the wrong order, and a correction that is remembered."""
    stock, own, said = followed(*drawn, skips={WHOLE: SKIPS[WHOLE]})
    shares = shares_of([stock])
    assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=1e-3) and shares[1] > 1
    runs = dict(zip((0, 1, 2, 4, 6), (parts_of(raw, shares) for raw in own.raw), strict=True))
    (u0, c0), (u1, c1), (u2, c2), (u4, c4) = (runs[call] for call in (0, 1, 2, 4))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(own.guided[3].flatten(), total([1.2 * u2 - 0.3 * u1, 0.9 * c2 + 0.2 * c1 - 0.1 * c0]))
    # Without a branch left out the weight of its own result is as it is given.
    close(own.guided[4].flatten(), total([0.7 * u2 + 0.4 * u1, 1.1 * c4 - 0.2 * c2]))
    close(own.guided[5].flatten(), total([0.9 * u4 + 0.1 * u2, c4]))
    assert said.skipped == {WHOLE: (2, 5)}


def test_a_call_leaves_the_unconditional_branch_out(drawn):
    """Catches a branch that runs nevertheless, the conditional one left out, arguments of the other rows, and a
    forecast that is not remembered.
    """
    pipe, draw = drawn
    before = model_state(denoiser(pipe))
    stock, own, said = followed(pipe, draw)
    shares = shares_of([stock])
    raw = dict(zip((0, 1, 2, 4, 6), own.raw, strict=True))
    whole, half = (next(t for t in _tensors(raw[call])) for call in (2, 4))
    assert len(half) * 2 == len(whole)
    (_, _), (u1, _), (u2, c2), (u6, c6) = (parts_of(raw[call], shares) for call in (0, 1, 2, 6))
    c4 = shares[1] * half.detach().double().flatten().numpy()
    u4 = 0.7 * u2 + 0.4 * u1
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(own.guided[4].flatten(), total([u4, 1.1 * c4 - 0.2 * c2]))
    close(own.guided[5].flatten(), total([0.9 * u4 + 0.1 * u2, c4]))
    close(own.guided[6].flatten(), total([0.8 * u6 + 0.1 * u4, 1.1 * c6 - 0.2 * c4]))
    # The rows that ran gave what they give in the whole batch, whatever else the model is given for each row.
    _, other, _ = followed(pipe, draw, skips={WHOLE: SKIPS[WHOLE]})
    close(half, next(t for t in _tensors(other.raw[3]))[len(half) :])
    assert said.skipped == {WHOLE: (2, 5), BRANCH: (1, 4)}
    assert differences(before, model_state(denoiser(pipe))) == []


def _tensors(result):
    from gen_turbo.engine.values import tensors

    return tensors(result)


def test_merged_text_is_weighed_for_the_rows_that_run(tmp_path):
    """Catches sizes of merged text that are of the whole batch, where the call has half of it."""
    pipe, draw = _sd3(tmp_path)
    _, own, said = followed(pipe, draw, text_ratio=None)
    _, full, _ = followed(pipe, draw, skips={WHOLE: SKIPS[WHOLE]}, text_ratio=None)
    assert said.text_tokens[1] < said.text_tokens[0] and said.skipped[BRANCH] == (1, 4)
    half = _tensors(own.raw[3])[0]
    torch.testing.assert_close(half, _tensors(full.raw[3])[0][len(half) :], rtol=1e-4, atol=1e-4)


def test_a_call_without_a_branch_merges_nothing(tmp_path):
    """Catches maps of the whole batch that are laid over half of it, and residuals that are lost by it."""
    pipe, draw = _plain(tmp_path)
    inner = TurboProcessor(0.5, scope="attention", max_downsample=1, warmup_steps=1, full_every=8)
    _, own, said = followed(pipe, draw, inner=inner)
    _, full, without = followed(pipe, draw, skips={WHOLE: SKIPS[WHOLE]}, inner=inner)
    half, plain = _tensors(own.raw[3])[0], _tensors(full.raw[3])[0]
    assert len(half) * 2 == len(plain) and len(own.raw[4] if torch.is_tensor(own.raw[4]) else own.raw[4][0]) == 2
    counts = [[(r.num_full, r.num_reduced) for r in one.layers if r.num_reduced] for one in (said, without)]
    assert counts[0] and all((f, r) == (g + 1, s - 1) for (f, r), (g, s) in zip(*counts, strict=True))


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_run_without_guidance_takes_what_branches_come_to(name, tmp_path):
    """Catches the weights of one branch, half of a batch that holds no branches, and a count of it."""
    pipe, draw = PIPELINES[name](tmp_path)
    stock, own, said = followed(pipe, draw, guidance_scale=1.0)
    assert shares_of([stock]) == (1.0,)
    r0, r1, r2, r4 = (_tensors(raw)[0].double() for raw in own.raw[:4])
    (u3, c3), (_, c4), (a, b) = WEIGHTS[3], WEIGHTS[4], SHARES
    whole = (a * u3[0] + b * c3[0]) * r2 + (a * u3[1] + b * c3[1]) * r1 + b * c3[2] * r0
    torch.testing.assert_close(own.guided[3], whole, rtol=1e-4, atol=1e-4)
    # Where guided runs leave the unconditional branch out, everything runs, so that nothing stands for it.
    torch.testing.assert_close(own.guided[4], a * r4 + b * (c4[0] * r4 + c4[1] * r2), rtol=1e-4, atol=1e-4)
    assert said.skipped == {WHOLE: (2, 5), BRANCH: (0, 5)}


def test_an_adapter_of_images_is_narrowed_too(tmp_path):
    """Catches image embeddings, a list inside of a mapping, that keep the rows of the branch that is left out."""
    pipe, draw = _ip_adapter(tmp_path)
    _, own, said = followed(pipe, draw)
    _, full, _ = followed(pipe, draw, skips={WHOLE: SKIPS[WHOLE]})
    half = _tensors(own.raw[3])[0]
    assert said.skipped[BRANCH] == (1, 4)
    torch.testing.assert_close(half, _tensors(full.raw[3])[0][len(half) :], rtol=1e-4, atol=1e-4)


WRONG = [
    ({WHOLE: frozenset({3}), BRANCH: frozenset({4})}, {4: (0.7, 0.4)}),
    ({WHOLE: frozenset({3}), BRANCH: frozenset({4})}, {4: ((0.1, 0.7), (1.0,))}),
    ({WHOLE: frozenset({3}), BRANCH: frozenset({4})}, {4: ((0.0,), (1.0,))}),
    ({WHOLE: frozenset({3}), BRANCH: frozenset({3})}, {3: ((0.0, 0.7), (1.0,))}),
    ({WHOLE: frozenset({3}), BRANCH: frozenset({4})}, {}),
    ({WHOLE: frozenset({3}), BRANCH: frozenset({4}), "block": frozenset({2})}, {4: ((0.0, 0.7), (1.0,))}),
]


@pytest.mark.parametrize(("skips", "weights"), WRONG)
def test_what_cannot_stand_for_a_branch_is_refused(skips, weights):
    """Catches a branch that is left out with nothing in its place, or beside units that remember the whole batch."""
    with pytest.raises(ValueError, match="a guidance branch is left out at call"):
        Schedule(tuple(map(float, range(9, 2, -1))), skips, weights={WHOLE: weights}, shares=SHARES)


def test_branches_that_shares_do_not_tell_of_are_refused():
    """Catches weights that no batch can have, and weights for branches of a unit that gates forecast."""
    times, one = tuple(map(float, range(9, 2, -1))), {WHOLE: frozenset({3})}
    for branches, shares in ((3, SHARES), (2, ())):
        with pytest.raises(ValueError, match=f"weights for {branches} guidance branches at call 3; only output may"):
            Schedule(times, one, weights={WHOLE: {3: ((1.0,),) * branches}}, shares=shares)
    with pytest.raises(ValueError, match="block has weights for 2 guidance branches"):
        Schedule(times, {"block": frozenset({3})}, weights={"block": {3: ((1.0,), (1.0,))}}, shares=SHARES)
    with pytest.raises(ValueError, match="5 weights at call 6"):
        Schedule(times, {WHOLE: frozenset({6})}, weights={WHOLE: {6: ((1.0,), (0.2,) * 5)}}, shares=SHARES)


def test_branches_come_back_from_a_file(tmp_path):
    """Catches weights of branches that are flattened or refused, and odd ones that are taken."""
    times = tuple(map(float, range(9, 2, -1)))
    schedule = Schedule(times, SKIPS, cost=0.5, psnr_db=40.0, weights={WHOLE: WEIGHTS}, shares=SHARES)
    file = ScheduleFile("Model", (1.0,) * 32, "DDIMScheduler", (schedule,))
    write(tmp_path / "s.yaml", file, "a test")
    assert read(tmp_path / "s.yaml") == file
    tree = yaml.safe_load((tmp_path / "s.yaml").read_text())
    for odd in ([[1.2, -0.3], 0.9], [0.9, [1.2]], [[1.2, float("nan")], [0.9]], [[1.2, [0.3]], [0.9]], [[], [0.9]]):
        tree["levels"][0]["weights"][WHOLE][3] = odd
        (tmp_path / "odd.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(ValueError, match="is no schedule"):
            read(tmp_path / "odd.yaml")
    carried = carried_over(replace(schedule, skips={**SKIPS, MERGING: frozenset({0})}), (9.0, 7.5, 6.0, 4.5, 3.0))
    assert BRANCH not in carried.skips and WHOLE in carried.skips
