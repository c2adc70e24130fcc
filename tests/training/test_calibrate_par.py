"""The command `gen-turbo calibrate par` on vision-language models: prompts in, a router out."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import scenes
from gen_turbo.commands import cli
from gen_turbo.commands.asking import image_prompts, scene_prompts
from gen_turbo.config import load_config
from gen_turbo.engine.report import report
from gen_turbo.factory import build_pipeline

PATCH_PX = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """The embedded vision-language model's classes with 16 image tokens and random weights."""
    from gen_turbo.pipelines import tiny_vlm

    folder = tmp_path_factory.mktemp("vlm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_vlm.make_model(PATCH_PX).save_pretrained(folder)
    tiny_vlm.make_processor(PATCH_PX).save_pretrained(folder)
    return str(folder)


def pipeline(checkpoint: str):
    """The captioning pipeline of it."""
    return build_pipeline(load_config("caption", [f"checkpoint={checkpoint}", "processor=null", "max_new_tokens=2"]))


def test_the_command_makes_a_router_that_the_pipeline_takes(checkpoint, tmp_path, capsys):
    """Catches a file that no PARProcessor reads, and a folder from which nothing goes on."""
    output, folder = tmp_path / "router.safetensors", tmp_path / "state"
    arguments = ["calibrate", "par", "--config", "caption", f"checkpoint={checkpoint}", "max_new_tokens=2"]
    small = [
        "--updates",
        "2",
        "--samples",
        "2",
        "--batch",
        "2",
        "--width",
        "32",
        "--eval-batches",
        "1",
        "--folder",
        str(folder),
    ]
    assert cli.main([*arguments, *small, "--output", str(output)]) == 0
    told = capsys.readouterr().out
    assert "budget 60%" in told and told.rstrip().endswith(str(output))
    output.unlink()
    assert cli.main([*arguments, *small, "--output", str(output)]) == 0
    pipe = pipeline(checkpoint)
    pipe.set_attn_processor(_par(str(output)))
    pipe(scenes.render("a large red circle on a gray background", 0))
    assert 0.2 < report(pipe.vlm).flops_saved < 0.5


def _par(router: str):
    from gen_turbo import PARProcessor

    return PARProcessor(budget=0.6, router=router)


def test_wrong_arguments_are_one_sentence(checkpoint, tmp_path, capsys):
    """Catches prompts that are ignored without images, and settings found wrong only after training."""
    base = ["calibrate", "par", f"checkpoint={checkpoint}", "--output", str(tmp_path / "router.safetensors")]
    for arguments, words in (
        (["--ask", "what?"], "--ask gives prompts for --images"),
        (["--samples", "1"], "at least 2 samples"),
        (["--images", str(tmp_path / "none")], "does not exist"),
    ):
        assert cli.main([*base, *arguments]) == 2
        assert words in capsys.readouterr().err


def test_prompts_repeat_by_number_and_hold_back_scenes(checkpoint, tmp_path, monkeypatch):
    """Catches a batch that depends on the batches before, and training on the scenes of the benchmark."""
    pipe = pipeline(checkpoint)
    drawn = []
    monkeypatch.setattr(scenes, "render", _noting(drawn, scenes.render))
    give = scene_prompts(pipe, 3, seed=0)
    first, other, again = give(0), give(1), give(0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert drawn and not any(scenes.is_held_out(scenes.parse(caption)) for caption in drawn)
    scenes.render("a large red circle on a gray background", 0).save(tmp_path / "one.png")
    own = image_prompts(pipe, [tmp_path], ["what color is the circle"], 2, seed=0)(4)
    assert own["input_ids"].shape[0] == 2 and len(own["pixel_values"]) == 2


def _noting(drawn, render):
    def noted(caption, *arguments):
        drawn.append(caption)
        return render(caption, *arguments)

    return noted
