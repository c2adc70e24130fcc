"""Every example runs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from gen_turbo.registry import METHODS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "training", "seconds", "pipeline"),
    [
        ("train_tiny", "UNetTraining", ["0.5", "0.2", "0.2", "0.2"], StableDiffusionPipeline),
        ("train_tiny_dit", "TransformerTraining", ["0.2", "0.2", "0.2"], StableDiffusion3Pipeline),
    ],
)
def test_training_goes_on_where_it_stopped_and_ships_a_stock_pipeline(
    script, training, seconds, pipeline, tmp_path, monkeypatch
):
    """Catches a checkpoint that is written and never read, and weights that no stock pipeline can load."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train = load(script)
    monkeypatch.setattr(train, "STAGES", tuple(replace(stage, batch=2) for stage in train.STAGES))
    monkeypatch.setattr(train.tiny, "weights_folder", lambda: tmp_path / "shipped" / "tiny")

    def run() -> int:
        arguments = [script, "--output", str(tmp_path / "run"), "--scenes", "8", "--seconds", *seconds]
        monkeypatch.setattr(sys, "argv", arguments)
        train.main()
        return getattr(train, training)(tmp_path / "run", 0).trainer.steps

    first = run()
    assert first >= len(train.STAGES)
    assert run() == first
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path / "run"), "--ship"])
    train.main()
    shipped = tmp_path / "shipped" / script.removeprefix("train_").replace("_", "-")
    is_unet = pipeline is StableDiffusionPipeline
    absent = ("safety_checker",) if is_unet else ("text_encoder_3", "tokenizer_3")
    pipeline.from_pretrained(shipped, **dict.fromkeys(absent))
    weights = [load_file(path) for path in shipped.glob("*/diffusion_pytorch_model.safetensors")]
    assert len(weights) == 2
    assert all(value.dtype == torch.float16 for tensors in weights for value in tensors.values())


def test_an_own_method_works(capsys, monkeypatch):
    """Catches a contract that takes more than the one file that the README shows."""
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    load("own_method").main()
    assert "4096 -> 2048 tokens" in capsys.readouterr().out


def test_every_example_is_run_by_a_test():
    """Catches an example that rots."""
    trainings = {"train_tiny", "train_tiny_dit", "train_tiny_vlm", "training", "tiny_data", "vlm_data", "muon"}
    tested = trainings | {"own_method", "demo"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
