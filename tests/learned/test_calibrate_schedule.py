"""The command `gen-turbo calibrate par` on a diffusion pipeline: prompts in, a file of schedules out."""

import pytest
import torch

from gen_turbo import PARProcessor, load_pipeline
from gen_turbo.cli import main
from gen_turbo.learned.schedule import WHOLE, read
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
    command += ["--steps", "6", "--prompts", "1", "--prompt", "a circle", "--budgets", "0.7", "0.4", "--inner", "none"]
    assert main([*command, "--output", str(output)]) == 0, capsys.readouterr().err
    file = read(output)
    assert file.num_calls == 6 and len(file.schedules) == 2
    assert all(schedule.skips and schedule.psnr_db < 100 for schedule in file.schedules)
    whole = [schedule.skips.get(WHOLE, frozenset()) for schedule in file.schedules]
    assert len(whole[1]) > len(whole[0])

    pipe = load_pipeline("tiny", processor=None, checkpoint=str(checkpoint))
    pipe.set_progress_bar_config(disable=True)
    before = model_state(pipe.unet)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 6, "height": 32, "width": 32, "generator": generator, "output_type": "pt"}
        return pipe("a circle", **given).images

    stock = draw()
    pipe.set_attn_processor(PARProcessor(budget=0.999, schedule=str(output), inner=None))
    assert not torch.equal(draw(), stock)
    pipe.reset_attn_processor()
    assert torch.equal(draw(), stock)
    assert [key for key in differences(before, model_state(pipe.unet)) if key != "random"] == []


def test_too_few_steps_are_refused(checkpoint, tmp_path, capsys):
    """Catches an empty file where nothing can be skipped."""
    command = ["calibrate", "par", "--config", "tiny", f"checkpoint={checkpoint}", "--steps", "3", "--prompts", "1"]
    assert main([*command, "--prompt", "a circle", "--output", str(tmp_path / "own.yaml")]) == 2
    assert "a run of 3 calls has nothing to skip; take at least 4 steps" in capsys.readouterr().err
