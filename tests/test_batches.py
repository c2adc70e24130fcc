"""What happens to a run when an image, a model, a name, a terminal or the memory gives trouble."""

from __future__ import annotations

import io
import json
import os
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from gen_turbo.commands import caption as captioning
from gen_turbo.commands import cli
from gen_turbo.commands.asking import any_image
from gen_turbo.config import ConfigError
from tests.stub_pipelines import CaptionStub, GenerateStub, image


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder with eight images in `in`."""
    (tmp_path / "in").mkdir()
    for number in range(8):
        image(number).save(tmp_path / "in" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _with(monkeypatch, check, stub=CaptionStub) -> None:
    monkeypatch.setattr(captioning, "build_pipeline", lambda config, processor: stub(check))


def _noted(path: str = "said.jsonl") -> dict[str, dict]:
    return {Path(line["input"]).name: line for line in map(json.loads, Path(path).read_text().splitlines())}


def _numbers(images: list[Image.Image]) -> list[int]:
    return [one.getpixel((0, 0))[0] for one in images]


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), KeyError("x"), TypeError(), ZeroDivisionError("z"), AssertionError(), RuntimeError("a\nb")],
)
def test_one_bad_image_fails_alone(folder, monkeypatch, capsys, error):
    """Catches a list of known exceptions, a batch that is lost with one of its images, and an empty reason."""

    def check(images):
        if 5 in _numbers(images):
            raise error

    _with(monkeypatch, check)
    assert cli.main(["caption", "in", "--output", "said.jsonl"]) == captioning.SOME_FAILED
    noted = _noted()
    assert sorted(name for name, line in noted.items() if "caption" in line) == [
        f"{i}.png" for i in (0, 1, 2, 3, 4, 6, 7)
    ]
    assert noted["5.png"]["error"]
    assert "7 done, 0 finished before, 1 failed" in capsys.readouterr().err
    _with(monkeypatch, lambda images: None)
    assert cli.main(["caption", "in", "--output", "said.jsonl"]) == 0
    assert "1 done, 7 finished before, 0 failed" in capsys.readouterr().err
    assert "error" not in _noted()["5.png"]


def test_a_short_answer_is_a_failure(folder, monkeypatch):
    """Catches captions that move to other images where a model gives fewer than it was asked for."""

    class Short(CaptionStub):
        def __call__(self, images):
            said = super().__call__(images)
            said.texts = said.texts[: 1 if len(images) == 1 else -1]
            return said

    _with(monkeypatch, lambda images: None, Short)
    assert cli.main(["caption", "in", "--output", "said.jsonl"]) == 0
    assert {line["caption"].split(",")[0] for line in _noted().values()} == {f"({number}" for number in range(8)}


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory", None])
def test_out_of_memory_halves_the_batch(folder, monkeypatch, message):
    """Catches a run that ends where a smaller batch fits, and one that tries every batch too large again."""
    sizes = []

    def check(images):
        sizes.append(len(images))
        if len(images) > 3:
            raise RuntimeError(message) if message else MemoryError

    _with(monkeypatch, check)
    for number in range(8, 16):
        image(number).save(folder / "in" / f"{number}.png")
    assert cli.main(["caption", "in", "--output", "said.jsonl", "batch_size=8"]) == 0
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2]
    assert len(_noted()) == 16


def test_a_image_beyond_all_memory_fails_alone(folder, monkeypatch):
    """Catches a run that ends because of one huge image."""

    def check(images):
        if 2 in _numbers(images):
            raise RuntimeError("CUDA out of memory")

    _with(monkeypatch, check)
    assert cli.main(["caption", "in", "--output", "said.jsonl"]) == captioning.SOME_FAILED
    assert [name for name, line in _noted().items() if "error" in line] == ["2.png"]


NAMES = {
    "not UTF-8": b"m\xff\xfe.png",
    "long": b"m" * 251 + b".png",
    "longer than a result's": b"m" * 252 + b".gi",
    "newline": b"a\nb.png",
    "escape": b"a\x1b[31m.png",
    "accent": "h\u00e9llo\u4e16.png".encode(),
    "only suffix": b".png",
    "dashes": b"--seed.png",
    "dots": b"..png",
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("command", ["caption", "caption-generate"])
def test_odd_names_are_worked_on(folder, monkeypatch, command, name, encoding):
    """Catches a run that ends at a name that it cannot print, write or note, and every later run with it."""
    image(99).save(folder / "99.png")
    os.rename(folder / "99.png", os.fsencode(folder / "in") + b"/" + name)
    _with(monkeypatch, lambda images: None, CaptionStub if command == "caption" else GenerateStub)
    output = "said.jsonl" if command == "caption" else "out"
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    images = ["in", f"in/{os.fsdecode(name)}"]
    assert cli.main([command, *images, "--output", output]) == 0
    sys.stdout.flush()
    assert raw.getvalue().count(b"\n") == 9 and b"\x1b" not in raw.getvalue()
    noted = _noted("said.jsonl" if command == "caption" else "out/manifest.jsonl")
    assert len(noted) == 9
    assert cli.main([command, *images, "--output", output]) == 0
    if command == "caption-generate":
        assert sorted(line["output"] for line in noted.values()) == sorted(
            path.name for path in (folder / "out").glob("*.png")
        )


def test_unreadable_inputs_are_failures(folder, monkeypatch, capsys):
    """Catches a damaged, an empty or a vanishing image that ends the run."""
    (folder / "in" / "empty.png").touch()
    (folder / "in" / "half.png").write_bytes((folder / "in" / "0.png").read_bytes()[:45])
    (folder / "in" / "gone.png").write_bytes((folder / "in" / "0.png").read_bytes())
    _with(monkeypatch, lambda images: (folder / "in" / "gone.png").unlink(missing_ok=True))
    assert cli.main(["caption", "in", "--output", "said.jsonl", "batch_size=2"]) == captioning.SOME_FAILED
    assert "8 done, 0 finished before, 3 failed" in capsys.readouterr().err


def test_one_image_by_two_names_is_worked_on_once(folder, monkeypatch, capsys):
    """Catches a link and its image that are two items of one row, of which one is never finished."""
    (folder / "link.png").symlink_to(folder / "in" / "0.png")
    _with(monkeypatch, lambda images: None, GenerateStub)
    assert cli.main(["caption-generate", "in", "link.png"]) == 0
    assert "8 done" in capsys.readouterr().err


def test_another_batch_size_or_device_changes_no_result(folder, monkeypatch, capsys):
    """Catches images that are all made again because of a setting that they do not depend on."""
    _with(monkeypatch, lambda images: None, GenerateStub)
    assert cli.main(["caption-generate", "in"]) == 0
    same = ["batch_size=1", "caption.batch_size=1", "generate.device=cpu", "generate.max_size=8192"]
    assert cli.main(["caption-generate", "in", *same]) == 0
    assert "0 done, 8 finished before" in capsys.readouterr().err
    assert cli.main(["caption-generate", "in", "generate.steps=3"]) == 0
    assert "8 done, 0 finished before" in capsys.readouterr().err


def test_a_bad_image_ends_no_training(folder, capsys):
    """Catches a step that can never be passed, and draws that differ once the bad image is known."""
    (folder / "in" / "bad.png").write_bytes(b"no image")
    files = sorted((folder / "in").iterdir())
    draw = any_image(files)
    first, again = ([_numbers([draw(random.Random(seed))]) for seed in range(30)] for _ in range(2))
    assert first == again and len({one[0] for one in first}) > 4
    assert capsys.readouterr().err.count("bad.png") == 1
    with pytest.raises(ConfigError, match="hardly one can be read"):
        any_image([folder / "in" / "bad.png"])(random.Random(0))
