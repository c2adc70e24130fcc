"""The demo runs from its file and shows what it claims."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from stated import FAST

from gen_turbo import TurboProcessor
from gen_turbo.engine import settling
from gen_turbo.pipelines import tiny_vlm
from tests.tiny_hosts import sd_pipeline

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"
SETTINGS = """
pipeline: text-to-image
checkpoint: {folder}
dtype: float32
device: cpu
"""
WORKFLOW = """
pipeline: caption-generate
caption: {{checkpoint: {folder}/vlm, max_new_tokens: 3, device: cpu}}
generate: {{checkpoint: {folder}/pipeline, device: cpu, steps: 10}}
"""


def test_the_demo_draws_pairs_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a demo whose Turbo column is stock again, that hides where the images are, or leaves out a half."""
    monkeypatch.setattr(settling, "device_class", lambda device: FAST)
    sd_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_vlm.make_model().save_pretrained(tmp_path / "vlm")
    tiny_vlm.make_processor().save_pretrained(tmp_path / "vlm")
    settings, output = tmp_path / "toy.yaml", tmp_path / "demo.png"
    settings.write_text(SETTINGS.format(folder=tmp_path / "pipeline"))
    workflow, anew = tmp_path / "workflow.yaml", tmp_path / "anew.png"
    workflow.write_text(WORKFLOW.format(folder=tmp_path))
    arguments = ["--pipeline", str(settings), "--prompts", "2", "--steps", "10", "--output", str(output)]
    arguments += ["--workflow", str(workflow), "--images", "1", "--workflow-output", str(anew)]
    monkeypatch.setattr(sys, "argv", [str(DEMO), *arguments])
    runpy.run_path(str(DEMO), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"256 -> {256 - int(256 * TurboProcessor().ratio)}" in printed
    assert "inf dB" not in printed
    assert str(output) in printed
    assert str(anew) in printed and "skipped" not in printed
    _, _, following = printed.partition("try next:\n")
    assert [line.split()[0] for line in following.splitlines()] == ["gen-turbo"] * 3
    assert "(256 -> 88 image tokens)" in printed
    with Image.open(anew) as image:
        assert image.width > 3 * 64
    with Image.open(output) as image:
        assert image.width > 2 * 64


def test_an_output_that_cannot_be_written_is_refused_before_drawing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches minutes of drawing for an image that has no format."""
    monkeypatch.setattr(sys, "argv", [str(DEMO), "--output", "folder"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(DEMO), run_name="__main__")
    assert "argument --output: folder is no .png file" in capsys.readouterr().err
