"""Answers of a vision-language model under settings: a real one at its size, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_turbo import load_pipeline, scenes
from gen_turbo.bench import records, understanding
from gen_turbo.bench.settings import Method
from gen_turbo.bench.tables import TABLES
from gen_turbo.commands.cli import main
from gen_turbo.pipelines import tiny_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without training, as the training script would leave it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_vlm.make_model().save_pretrained(folder)
    tiny_vlm.make_processor().save_pretrained(folder)
    return folder


def test_every_kind_is_asked_with_its_true_answer() -> None:
    """Catches a kind that is never asked, and a caption or a dot of another image."""
    asks = understanding.asked(4, seed=0)
    assert {ask.kind for ask in asks} == {"caption", *scenes.KINDS}
    assert [ask.kind for ask in asks].count("caption") == [ask.kind for ask in asks].count("detail") == 4
    for ask in asks:
        if ask.kind == "caption":
            scene = scenes.parse(ask.answer)
            assert scenes.is_held_out(scene)
        elif ask.kind == "detail":
            pixels = set(ask.image.get_flattened_data())
            assert scenes.COLORS[ask.answer] in pixels


def test_no_setting_stands_twice() -> None:
    """Catches what is measured again under a second name where trained weights have a number that others keep too."""
    settings = understanding.catalogue()
    assert len({repr(setting.params()) for setting in settings}) == len({one.name for one in settings}) == len(settings)
    names = {setting.name for setting in settings}
    assert {"pool-11", "vistog_vit-28", "pool-64", "vistog_vit-untrained-64"} <= names
    # At other numbers nothing would read the setting that gives them their name.
    assert {name for name in names if "turbo_vit-diverse" in name} == {"turbo_vit-diverse-11"}


def test_dots_survive_where_more_than_half_leave_at_once() -> None:
    """Catches the most alike kept instead of the most unlike, which loses what is small and stands alone."""
    pipe = load_pipeline("caption", processor=None, device="cpu", dtype="float32")
    asks = [ask for ask in understanding.asked(40, seed=7) if ask.kind == "detail"]
    settings = {"keep": 28, "semantic": "self", "proportional_attention": True}
    right = {}
    for how in ("repeat", "diverse"):
        setting = Method(how, how, "turbo_vit", settings | {"beyond_half": how})
        values, counts = understanding.accuracy(pipe, asks, setting)
        assert counts["kept"] == 28
        right[how] = sum(values["detail"])
    assert right["diverse"] > 0.9 * len(asks) > right["repeat"]


def test_settings_say_how_many_tokens_they_keep(folder: Path, tmp_path: Path) -> None:
    """Catches a budget that differs between methods, a run that starts over, and a table that mixes them up."""
    arguments = ["bench", "understanding", "--model", str(folder), "--images", "1", "--records", str(tmp_path)]
    arguments += ["--settings", "turbo-50", "fastv-11", "random-11", "par_random-l4"]
    assert main(arguments) == 0
    found = {record.setting: record for record in records.load(tmp_path, "understanding")}
    kept = {name: record.counts["kept"] for name, record in found.items()}
    assert kept == {"turbo-50": 128, "fastv-11": 28, "random-11": 28, "par_random-l4": round(256 * 4 / 6)}
    assert found["par_random-l4"].counts["cost"] == round(1000 * 4 / 6) and found["turbo-50"].counts["cost"] < 600
    assert all(set(map(len, record.values.values())) == {1} for record in found.values())
    before = (tmp_path / "understanding.jsonl").read_bytes()
    assert main([*arguments, "--image", str(tmp_path / "kept.png")]) == 0
    assert (tmp_path / "understanding.jsonl").read_bytes() == before
    _compare_kept(tmp_path / "kept.png")
    rows = TABLES["understanding"](tmp_path).splitlines()[2:5]
    assert [row.split(" | ")[1] for row in rows] == ["128 of 256", "28 of 256", "28 of 256"]
    assert TABLES["routing"](tmp_path).splitlines()[2].startswith("| 4 layers |")


def test_times_are_added_to_answers(folder: Path, tmp_path: Path) -> None:
    """Catches answers that are asked again or lost for their times, stock timed against itself, and unpaired rounds."""
    arguments = ["bench", "understanding", "--model", str(folder), "--images", "1", "--records", str(tmp_path)]
    arguments += ["--settings", "stock", "pool-11"]
    assert main(arguments) == 0
    before = {record.setting: record for record in records.load(tmp_path, "understanding")}
    assert main([*arguments, "--rounds", "2"]) == 0
    stock, pool = records.load(tmp_path, "understanding")
    assert stock == before["stock"] and not stock.cpu_s
    assert (pool.values, pool.counts) == (before["pool-11"].values, before["pool-11"].counts)
    assert len(pool.cpu_s) == len(pool.baseline_cpu_s) == 2 and pool.cpu_s != pool.baseline_cpu_s
    rows = [row.split(" | ") for row in TABLES["understanding"](tmp_path).splitlines()[2:4]]
    assert [bool(row[3].strip()) for row in rows] == [False, True]


def _compare_kept(path: Path) -> None:
    """The rows of the image: as it is, halved by merging, 28 patches by FastV, 28 at random."""
    with Image.open(path).convert("RGB") as sheet:
        stock, turbo, random, fastv = (sheet.crop((0, 144 * row + 16, 128, 144 * row + 144)) for row in range(4))
    assert turbo.tobytes() != stock.tobytes()
    for chosen in (random, fastv):
        same = (np.asarray(chosen) == np.asarray(stock)).all(-1).reshape(16, 8, 16, 8).all((1, 3))
        assert same.sum() == 28


def test_right_answers_are_told_from_wrong_ones(folder: Path) -> None:
    """Catches a comparison that passes anything: the model's own answers are right, others are not."""
    pipe = load_pipeline("caption", processor=None, checkpoint=str(folder))
    asks = understanding.asked(1, seed=0)
    own = list(understanding.answers(pipe, asks))
    right = [ask._replace(answer=said) for ask, said in zip(asks, own, strict=True)]
    mixed = [right[0]._replace(answer="no"), *right[1:]]
    values, counts = understanding.accuracy(pipe, mixed, understanding.Stock())
    assert values.pop(mixed[0].kind) == [0.0]
    assert all(right == [1.0] for right in values.values())
    assert counts["kept"] == 256


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback of another library where the model is missing."""
    assert main(["bench", "understanding", "--model", str(tmp_path), "--records", str(tmp_path)]) == 2
    assert "it holds no config.json" in capsys.readouterr().err
