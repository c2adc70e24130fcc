"""The command `gen-turbo calibrate par` on a diffusion pipeline: prompts in, a file of schedules out."""

import pytest
import torch

from gen_turbo import PARProcessor, load_pipeline
from gen_turbo.commands.cli import main
from gen_turbo.training.calibrate_route import LATE, Fits
from gen_turbo.training.schedule import BRANCH, MERGING, WHOLE, Schedule, carried_over, undominated
from gen_turbo.training.schedule_file import read
from tests.snapshots import differences, model_state
from tests.tiny_hosts import sd_pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny pipeline on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sd_pipeline().save_pretrained(folder)
    return folder


def test_a_pipeline_is_calibrated_and_takes_its_schedule(checkpoint, tmp_path, capsys):
    """Catches a file that another load of the same weights refuses, and schedules that skip nothing."""
    output = tmp_path / "own.yaml"
    command = ["calibrate", "par", "--config", "tiny", f"checkpoint={checkpoint}", "height=32", "width=32"]
    command += ["--steps", "6", "--prompts", "1", "--prompt", "a circle", "--budgets", "0.7", "0.45", "--inner", "none"]
    code, said = main([*command, "--output", str(output)]), capsys.readouterr()
    assert code == 0, said.err
    assert (said.out + said.err).count("of the time of stock") == 2
    file = read(output)
    # Times of so small a model scatter: the second may have been no cheaper than the first.
    assert file.num_calls == 6 and file.schedules and undominated(file.schedules) == file.schedules
    assert all(schedule.skips for schedule in file.schedules)
    assert min(schedule.psnr_db for schedule in file.schedules) < 100
    # For each length the best route, and where a half call more fits, one of that.
    assert (said.out.count("of the calls of stock"), said.out.count("without its unconditional branch")) == (3, 1)

    pipe = load_pipeline("tiny", processor=None, checkpoint=str(checkpoint))
    pipe.set_progress_bar_config(disable=True)
    before = model_state(pipe.unet)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 6, "height": 32, "width": 32, "generator": generator, "output_type": "pt"}
        return pipe("a circle", guidance_scale=3.0, **given).images

    stock = draw()
    pipe.set_attn_processor(PARProcessor(budget=0.999, schedule=str(output), inner=None))
    assert not torch.equal(draw(), stock)
    pipe.reset_attn_processor()
    assert torch.equal(draw(), stock)
    assert [key for key in differences(before, model_state(pipe.unet)) if key != "random"] == []


def test_a_schedule_is_carried_over_by_its_times(checkpoint, tmp_path, capsys):
    """Catches calls that are carried over by their number, a first call without, and another model's schedule."""
    skips = {WHOLE: frozenset({1}), "b": frozenset({2}), MERGING: frozenset({0, 1})}
    known = Schedule((900.0, 600.0, 300.0), skips, {"b": 0.5}, 0.4, 30.0, "turbo")
    made = carried_over(known, [900.0, 750.0, 600.0, 450.0, 300.0, 150.0])
    assert made.skips == {WHOLE: frozenset({2, 3}), "b": frozenset({4, 5}), MERGING: frozenset({0, 1, 2, 3})}
    assert (made.slopes, made.inner, made.cost, made.psnr_db) == ({"b": 0.5}, "turbo", 1.0, None)
    assert carried_over(known, [600.0, 500.0]).skips == {WHOLE: frozenset({1}), MERGING: frozenset({0, 1})}

    command = ["calibrate", "par", "--config", "tiny", f"checkpoint={checkpoint}", "height=32", "width=32"]
    command += ["--prompts", "1", "--prompt", "a circle", "--no-parts"]
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    assert main([*command, "--steps", "5", "--budgets", "0.5", "--output", str(first)]) == 0
    assert main([*command, "--steps", "10", "--init-schedule", str(first), "--output", str(second)]) == 0
    short, long = read(first).schedules, read(second).schedules
    # Without merging, with the last call merged, and with the last call on the conditional branch alone.
    assert [schedule.inner for schedule in short] == [schedule.inner for schedule in long] == [None, LATE, None]
    assert [BRANCH in schedule.skips for schedule in short] == [False, False, True]
    for one, other in zip(short, long, strict=True):
        assert len(other.times) == 10 and other.skips == carried_over(one, other.times).skips and other.skips
        assert BRANCH not in other.skips
    capsys.readouterr()
    assert main(["calibrate", "par", "--config", "tiny", "--init-schedule", str(first), "--output", str(second)]) == 2
    assert "was made for another UNet2DConditionModel" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "kept"), [(0.9, [None]), (1.1, [None, LATE])])
def test_a_last_call_merges_only_where_that_is_clearly_nearer(checkpoint, tmp_path, monkeypatch, more, kept):
    """Catches a schedule that merges and costs more than one that does not, for a difference that chance can make."""
    # Of the plain one, of one whose last call merges, and of one whose last call leaves a branch out.
    distances = iter([50.0, 50.0 + more, 49.0])
    monkeypatch.setattr(Fits, "best", lambda fits, same, is_narrow: (same[0], next(distances)))
    output = tmp_path / "own.yaml"
    command = ["calibrate", "par", "--config", "tiny", f"checkpoint={checkpoint}", "height=32", "width=32"]
    command += ["--prompts", "1", "--prompt", "a circle", "--no-parts", "--steps", "5", "--budgets", "0.58"]
    assert main([*command, "--output", str(output)]) == 0
    schedules = read(output).schedules
    assert [schedule.inner for schedule in schedules] == kept
    assert [len(schedule.ran_before(WHOLE, 5)) for schedule in schedules] == [2, 3][: len(kept)]


def test_a_schedule_that_another_beats_is_left_out():
    """Catches one that is dearer and farther in a file, a rival with merging for one without, and equals both lost."""

    def measured(cost: float, psnr_db: float, inner: str | None) -> Schedule:
        return Schedule((2.0, 1.0), {WHOLE: frozenset({1})}, {}, cost, psnr_db, inner)

    best, worse, cheaper = measured(0.5, 60.0, "turbo"), measured(0.6, 59.0, "turbo"), measured(0.4, 50.0, "turbo")
    plain, equal = measured(0.6, 40.0, None), measured(0.5, 60.0, "turbo")
    assert undominated([worse, best, cheaper, plain, equal]) == (best, cheaper, plain)


def test_too_few_steps_are_refused(checkpoint, tmp_path, capsys):
    """Catches an empty file where nothing can be skipped."""
    command = ["calibrate", "par", "--config", "tiny", f"checkpoint={checkpoint}", "--steps", "3", "--prompts", "1"]
    assert main([*command, "--prompt", "a circle", "--output", str(tmp_path / "own.yaml")]) == 2
    assert "a run of 3 calls has nothing to skip; take at least 4 steps" in capsys.readouterr().err
