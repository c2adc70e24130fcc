"""The demo runs from its file and shows what it claims."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from gen_turbo import TurboProcessor
from tests.tiny_hosts import sd_pipeline

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"
SETTINGS = """
pipeline: text-to-image
checkpoint: {folder}
dtype: float32
device: cpu
"""


def test_the_demo_draws_pairs_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a demo whose Turbo column is stock again, or that hides where the picture is."""
    sd_pipeline().save_pretrained(tmp_path / "pipeline")
    settings, output = tmp_path / "toy.yaml", tmp_path / "demo.png"
    settings.write_text(SETTINGS.format(folder=tmp_path / "pipeline"))
    arguments = ["--pipeline", str(settings), "--prompts", "2", "--steps", "5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(DEMO), *arguments])
    runpy.run_path(str(DEMO), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"256 -> {256 - int(256 * TurboProcessor().ratio)}" in printed
    assert "inf dB" not in printed
    assert str(output) in printed
    with Image.open(output) as image:
        assert image.width > 2 * 64
