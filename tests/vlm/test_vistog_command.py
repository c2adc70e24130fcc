"""`gen-turbo calibrate vistog`: from images or drawn scenes to weights that attach, in one command."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import attach, scenes
from gen_turbo.commands.cli import main
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.pipelines import tiny_vlm

SMALL = ["--num-tokens", "16", "--steps", "1", "1", "--batch", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded architecture with random weights."""
    folder = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(0)
    tiny_vlm.make_model(16).save_pretrained(folder)
    tiny_vlm.make_processor(16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty images and two questions."""
    folder = tmp_path_factory.mktemp("images")
    for number, caption in enumerate(scenes.captions(20, 0)):
        scenes.render(caption, number).save(folder / f"{number}.png")
    (folder / "questions.txt").write_text("what color is the background\n\nhow many objects are there\n")
    return folder


def test_scenes_become_weights(checkpoint, tmp_path, capsys):
    """Catches a command that trains another model than the one it loads, or writes what cannot be attached."""
    given = [
        "calibrate",
        "vistog",
        *SMALL,
        "--hard-negatives",
        "2",
        "--output",
        str(tmp_path),
        f"checkpoint={checkpoint}",
    ]
    assert main(given) == 0
    told = capsys.readouterr().out
    path = tmp_path / "vistog.safetensors"
    assert "on 12 held-out questions" in told and told.splitlines()[-1] == str(path)
    model = tiny_vlm.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    with attach(model, VisToGVisionProcessor(weights=str(path))):
        assert len(model.get_image_features(pixel_values=torch.zeros(1, 3, 128, 128)).pooler_output[0]) == 64


def test_images_of_ones_own_become_weights(checkpoint, images, tmp_path, capsys):
    """Catches questions that are not asked, and images that are judged by after they were trained on."""
    files = ["--images", str(images), "--questions", str(images / "questions.txt")]
    assert main(["calibrate", "vistog", *SMALL, *files, "--output", str(tmp_path), f"checkpoint={checkpoint}"]) == 0
    assert (tmp_path / "vistog.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--num-tokens", "64"], "num_tokens must be below the 64 patches"),
        (["--num-tokens", "4", "--questions", "x"], "name images too"),
        (["--num-tokens", "4", "--hard-negatives", "0"], "--batch and --hard-negatives count from 1; got 16 and 0"),
        (["--num-tokens", "4", "--images", "few"], "1 images are too few to train on; give at least 20"),
        (["--num-tokens", "4", "--images", "many", "--questions", "empty"], "holds no question"),
    ],
)
def test_what_does_not_fit_is_said_first(checkpoint, images, tmp_path, capsys, given, words):
    """Catches an error after minutes of training, or a traceback."""
    (tmp_path / "empty").write_text("\n")
    places = {"few": str(images / "0.png"), "many": str(images), "empty": str(tmp_path / "empty")}
    arguments = [places.get(text, text) for text in given]
    assert main(["calibrate", "vistog", *arguments, "--output", str(tmp_path), f"checkpoint={checkpoint}"]) == 2
    assert words in capsys.readouterr().err


def test_help_says_what_is_drawn(capsys):
    """Catches a sentence from which nobody can tell whether N questions are drawn, or N are learned from."""
    with pytest.raises(SystemExit) as left:
        main(["calibrate", "vistog", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "--hard-negatives N N questions are drawn for each one that is learned from" in words
