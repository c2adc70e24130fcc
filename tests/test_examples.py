"""Every example runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from gen_turbo import TurboProcessor
from gen_turbo.registry import METHODS

READERS = ("llava", "qwen_vl")
MODEL_PAGES = ("sd15", "sdxl", "flux", "sd3", "pixart", "wan", *READERS)
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


def test_tuned_settings_are_loaded_again(tmp_path, monkeypatch, capsys):
    """Catches a search whose result no pipeline reads."""
    pytest.importorskip("optuna", reason="the tune extra is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--tiny"])
    load("tune").main()
    assert "auto" not in (printed := capsys.readouterr().out) and "layers reduced" in printed
    assert (tmp_path / "tuned.png").stat().st_size > 0


def test_a_batch_on_ray_gives_its_results(tmp_path):
    """Catches a script whose items, command and results do not fit each other."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "ray_batch.py"), "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["fox-0", "fox-1"]
    assert len(list((tmp_path / "animals").glob("*.png"))) == 2


@pytest.mark.parametrize("name", MODEL_PAGES)
def test_the_script_of_a_model_page_runs(name, tmp_path, monkeypatch, capsys):
    """Catches a script that works for its author's checkpoint alone, and one that reduces nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny"])
    load(name).main()
    printed = capsys.readouterr().out
    assert "layers reduced" in printed and " 0 of " not in printed
    made = list(tmp_path.iterdir())
    assert name in READERS or (made and made[0].stem == name and made[0].stat().st_size > 0)


def test_the_image_of_readme_is_labelled_from_records(tmp_path, monkeypatch):
    """Catches a speed-up that was typed in by hand."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    gain = load("gain")
    monkeypatch.setattr(
        sys, "argv", ["gain.py", "--captions", "1", "--steps", "4", "--output", str(tmp_path / "g.png")]
    )
    monkeypatch.setattr(gain, "COLUMNS", {"stock": None, "turbo-correct-r0.75-k3-o1": TurboProcessor(0.75)})
    gain.main()
    assert (tmp_path / "g.png").stat().st_size > 0
    lines = [json.loads(line) for line in (gain.RECORDS / "quality.jsonl").read_text().splitlines()]
    name = "turbo-correct-r0.75-k3-o1"
    [own] = [one for one in lines if one["setting"] == name and (one["params"]["steps"], "cpu_s" in one) == (25, True)]
    faster = statistics.median(a / b for a, b in zip(own["baseline_cpu_s"], own["cpu_s"], strict=True))
    assert gain.label(name) == f"Turbo, {faster:.2f} x faster"


@pytest.mark.parametrize("name", ["images", "vision_language"])
def test_a_notebook_runs(name, tmp_path):
    """Catches a cell that fails, and one that was committed with its output."""
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    code = (
        "import nbclient, nbformat, sys\n"
        "notebook = nbformat.read(sys.argv[1], as_version=4)\n"
        "nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()\n"
        "print(sum(len(cell.get('outputs', ())) for cell in notebook.cells))\n"
    )
    # In a process of its own: the client's event loop warns where a test turns warnings into errors.
    command = [sys.executable, "-c", code, str(EXAMPLES / "notebooks" / f"{name}.ipynb")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert client and done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 3


def test_a_custom_pipeline_of_diffusers_is_accelerated(tiny_checkpoint, monkeypatch, tmp_path):
    """Catches a file that diffusers cannot load as `custom_pipeline`, and one that stays attached."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    path = str(EXAMPLES.parent / "pipelines" / "turbo_stable_diffusion.py")
    settings = {"custom_pipeline": path, "trust_remote_code": True, "safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(tiny_checkpoint, **settings)
    stock = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)

    def latents(which, **more):
        generator = torch.Generator().manual_seed(0)
        return which("a circle", num_inference_steps=4, generator=generator, output_type="latent", **more).images

    assert type(pipe).__name__ == "TurboStableDiffusionPipeline"
    before = dict(pipe.unet.attn_processors)
    assert not torch.equal(latents(pipe, ratio=0.7), latents(stock))
    assert torch.equal(latents(pipe, ratio=0.0), latents(stock))
    assert {name: id(one) for name, one in pipe.unet.attn_processors.items()} == {n: id(o) for n, o in before.items()}


def test_every_example_is_run_by_a_test():
    """Catches an example that rots."""
    trainings = {"train_tiny", "train_tiny_dit", "train_tiny_vlm", "training", "tiny_data", "vlm_data", "muon"}
    tested = trainings | {"own_method", "demo", "gain", "tiny_models", "tune", "ray_batch", *MODEL_PAGES}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_option_has_a_help_text(script):
    """Catches an option that `--help` names and does not explain."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    options = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    bare = [ast.unparse(call) for call in options if "help" not in [keyword.arg for keyword in call.keywords]]
    assert bare == []
