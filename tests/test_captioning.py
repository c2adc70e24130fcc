"""The commands `caption` and `caption-generate`: runs that go on, bad images, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gen_turbo import scenes
from gen_turbo.commands import caption as captioning
from gen_turbo.commands import cli


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A current folder with three images in `in`, one of them damaged."""
    (tmp_path / "in").mkdir()
    for index, caption in enumerate(scenes.captions(2, 0)):
        scenes.render(caption, index).save(tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG damaged")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def generate(vlm, tiny_checkpoint):
    """Runs `caption-generate` at toy size."""
    size = ["generate.height=32", "generate.width=32", "generate.steps=2", "generate.processor.restore=copy"]
    # At so few tokens a model of costs would merge none.
    size += ["generate.processor.scope=attention"]
    small = [f"caption.checkpoint={vlm}", f"generate.checkpoint={tiny_checkpoint}", "caption.max_new_tokens=3", *size]
    return lambda *arguments: cli.main(["caption-generate", *arguments, "--output", "out", *small])


def _lines(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_captions_are_printed_and_kept(here, vlm, capsys):
    """Catches one bad image that ends the run, exit code 0 in spite of it, and captions of other images."""
    arguments = ["caption", "in", f"checkpoint={vlm}", "--prompt", "it's: what", "max_new_tokens=3"]
    assert cli.main([*arguments, "--output", "said.jsonl"]) == captioning.SOME_FAILED
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in out.splitlines()] == [str(here / "in" / f"{i}.png") for i in (0, 1)]
    assert f"gen-turbo: cannot read the image {here / 'in' / 'bad.png'}: it is no image that Pillow knows\n" in err
    assert "2 done, 0 finished before, 1 failed" in err
    good = [line for line in _lines("said.jsonl") if "error" not in line]
    assert [f"{line['input']}: {line['caption']}" for line in good] == out.splitlines()
    assert {(line["tokens"], line["kept"]) for line in good} == {(256, 87 + 1)}
    assert cli.main([*arguments, "--output", "said.jsonl"]) == captioning.SOME_FAILED
    assert "0 done, 2 finished before, 1 failed" in capsys.readouterr().err
    assert cli.main(["caption", "in/0.png", "in/1.png", f"checkpoint={vlm}", "processor=null", "max_new_tokens=1"]) == 0


def test_a_run_goes_on(here, generate, capsys):
    """Catches finished images drawn again, others skipped, and a half line that spoils the manifest."""
    (here / "in" / "bad.png").unlink()

    def one(*arguments):
        # Sums of a batch of one and of a batch of two differ in their last bits.
        return generate(*arguments, "batch_size=1")

    assert one("in/0.png") == 0
    first = (here / "out" / "0.png").read_bytes()
    with (here / "out" / "manifest.jsonl").open("a") as file:
        file.write('{"input": "half a li')
    capsys.readouterr()
    stamp = (here / "out" / "0.png").stat().st_mtime_ns
    assert one("in") == 0
    assert "1 done, 1 finished before, 0 failed" in capsys.readouterr().err
    assert (here / "out" / "0.png").stat().st_mtime_ns == stamp
    lines = _lines("out/manifest.jsonl")
    assert [line["output"] for line in lines] == ["0.png", "1.png"]
    assert set(lines[0]) >= {"caption", "prompt", "caption_s", "generate_s", "tokens", "kept", "drawn_kept", "seed"}
    left = sorted(path.name for path in (here / "out").iterdir())
    assert left == ["0.png", "1.png", "manifest.jsonl", "manifest.sqlite"]
    assert one("in", "--seed", "1") == 0
    assert "2 done, 0 finished before" in capsys.readouterr().err
    assert (here / "out" / "0.png").read_bytes() != first
    assert one("in") == 0
    assert "2 done, 0 finished before" in capsys.readouterr().err
    assert (here / "out" / "0.png").read_bytes() == first


def test_finished_means_that_it_is_all_there(here, generate, capsys, monkeypatch):
    """Catches a load of both models for nothing, a lost image that counts as done, and a changed one that does."""
    (here / "in" / "bad.png").unlink()
    assert generate("in") == 0
    with monkeypatch.context() as patch:
        patch.setattr(captioning, "build_pipeline", lambda *arguments: pytest.fail("loaded for nothing"))
        assert generate("in") == 0
    (here / "out" / "0.png").unlink()
    scenes.render(scenes.captions(3, 0)[2], 0).save(here / "in" / "1.png")
    capsys.readouterr()
    assert generate("in") == 0
    assert "2 done, 0 finished before" in capsys.readouterr().err


def test_no_file_is_overwritten_but_its_own(here, generate):
    """Catches a new image in the old one's place, two of one name that share a file, and outputs taken as inputs."""
    (here / "in" / "bad.png").unlink()
    (here / "out").mkdir()
    (here / "out" / "0.png").write_bytes((here / "in" / "1.png").read_bytes())
    (here / "other").mkdir()
    (here / "other" / "1.png").write_bytes((here / "in" / "0.png").read_bytes())
    assert generate("in", "other/*.png", "out/0.png") == 0
    outputs = [line["output"] for line in _lines("out/manifest.jsonl")]
    assert len(set(outputs)) == 4
    assert "0.png" not in outputs
    assert outputs.count("1.png") == 1
    assert (here / "out" / "0.png").read_bytes() == (here / "in" / "1.png").read_bytes()
    assert generate("in", "other", "out") == 0
    assert len(_lines("out/manifest.jsonl")) == 4


WRONG = {
    "no input": (["caption"], "the following arguments are required: IN"),
    "missing": (["caption", "nope.png"], "nope.png does not exist"),
    "empty folder": (["caption-generate", "empty"], "empty holds no images"),
    "other kind": (["caption", "in", "--config", "tiny"], "cannot use the configuration tiny, which is of the kind"),
    "generate": (["generate", "--prompt", "x", "--config", "caption"], "cannot use the configuration caption"),
    "strength": (["caption-generate", "in", "--strength", "7"], "strength must be a number in (0, 1]"),
    "seed": (["caption-generate", "in", "--seed", "-1"], "the seed must be between 0"),
    "far seed": (["caption-generate", "in", "--seed", "4294967296"], "the seed must be between 0 and 4294967295"),
    "output": (["caption", "in", "--output", "said.txt"], "name a .jsonl file"),
    "method": (["caption", "in", "processor=nope"], "unknown method 'nope'"),
    "key": (["caption-generate", "in", "images=2"], "no setting 'images'"),
    "key of a half": (["caption-generate", "in", "steps=2"], "no setting 'steps'; write generate.steps\n"),
    "no manifest": (["caption", "in", "--output", "other.jsonl"], "is no manifest: it has the line"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_sentence(here, capsys, arguments, message):
    """Catches tracebacks, models loaded before the check, and folders that stay."""
    (here / "empty").mkdir()
    (here / "other.jsonl").write_text('{"a": 1}\n')
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not (here / "outputs").exists()


def test_a_name_with_an_equals_sign_is_a_image(tmp_path, monkeypatch):
    """Catches an image taken for a setting."""
    monkeypatch.chdir(tmp_path)
    Path("a=1.png").touch()
    assert captioning.split_inputs(["a=1.png", "b=1", "c.png"]) == (["a=1.png", "c.png"], ["b=1"])
