"""Every example runs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from gen_turbo.registry import METHODS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_goes_on_where_it_stopped_and_ships_a_stock_pipeline(tmp_path, monkeypatch):
    """Catches a checkpoint that is written and never read, and weights that no stock pipeline can load."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train = load("train_tiny")
    monkeypatch.setattr(train, "STAGES", tuple(replace(stage, batch=2) for stage in train.STAGES))
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(train.tiny, "weights_folder", lambda: shipped)

    def run(*seconds: str) -> int:
        arguments = ["train_tiny", "--output", str(tmp_path), "--scenes", "8", "--seconds", *seconds]
        monkeypatch.setattr(sys, "argv", arguments)
        train.main()
        return train.UNetTraining(tmp_path, 0).trainer.steps

    first = run("0.5", "0.2", "0.2", "0.2")
    assert first >= 3
    assert run("0.5", "0.2", "0.2", "0.2") == first
    monkeypatch.setattr(sys, "argv", ["train_tiny", "--output", str(tmp_path), "--ship"])
    train.main()
    assert load_file(shipped / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    StableDiffusionPipeline.from_pretrained(shipped, safety_checker=None)


def test_an_own_method_works(capsys, monkeypatch):
    """Catches a contract that takes more than the one file that the README shows."""
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    load("own_method").main()
    assert "4096 -> 2048 tokens" in capsys.readouterr().out


def test_every_example_is_run_by_a_test():
    """Catches an example that rots."""
    tested = {"train_tiny", "training", "tiny_data", "muon", "own_method", "demo"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
