"""Runs that keep a manifest: whatever ends them, and however many there are, nothing is lost or made twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gen_turbo.commands import caption as captioning
from gen_turbo.commands import cli
from gen_turbo.lines import Item
from gen_turbo.manifest import Manifest
from tests.manifests import content_of, generate, lines_of
from tests.stub_pipelines import GenerateStub, image

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("kind", "stride"), [("kill", 6), ("full", 9), ("limit", 5), ("together", 1)])
def test_nothing_is_lost_doubled_or_left_over(tmp_path, kind, stride):
    """Catches each of these, for kills, full disks and growing files at any point, and for two and four runs at once.

    The points are those of `tests/faults.py`: a fresh folder, and one whose images are all made again.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults", kind, str(tmp_path), str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > {"kill": 150, "full": 150, "limit": 10, "together": 1}[kind]


def test_a_result_that_was_changed_is_kept_and_made_again(folder, capsys):
    """Catches an edited image that is written over, and a lost, cut or empty one that counts as done."""
    assert generate() == 0
    out, whole = folder / "out", (folder / "out" / "1.png").read_bytes()
    (out / "0.png").write_bytes(b"edited")
    (out / "1.png").write_bytes(b"")
    (out / "2.png").unlink()
    capsys.readouterr()
    assert generate() == 0
    assert "3 done, 0 finished before" in capsys.readouterr().err
    assert (out / "0.png").read_bytes() == b"edited" and (out / "1.png").read_bytes() == whole
    outputs = {Path(line["input"]).name: line["output"] for line in lines_of()}
    assert outputs["0.png"] != "0.png" and (outputs["1.png"], outputs["2.png"]) == ("1.png", "2.png")


def test_a_failure_takes_nothing_away(folder, monkeypatch):
    """Catches a result that is forgotten, or its file, because the same image failed under other settings."""
    assert generate() == 0
    before = content_of(folder / "out")

    def refuse(images):
        raise ValueError("no")

    monkeypatch.setattr(captioning, "build_pipeline", lambda config, processor: GenerateStub(refuse))
    assert generate("--seed", "1") == captioning.SOME_FAILED
    after = content_of(folder / "out")
    assert {name: after[name] for name in ("0.png", "1.png", "2.png")} == {
        name: before[name] for name in ("0.png", "1.png", "2.png")
    }
    assert [line.get("error") for line in lines_of()] == [None, "no"] * 3
    monkeypatch.setattr(captioning, "build_pipeline", lambda *arguments: pytest.fail("loaded for nothing"))
    assert generate() == 0


@pytest.mark.parametrize("name", ["replace", "add_name"])
def test_a_name_that_was_planned_and_not_given_is_free_again(folder, monkeypatch, name):
    """Catches a plan that counts as done, whose old image is then left over, and a name that stays taken by it."""
    assert generate() == 0
    if name == "add_name":
        (folder / "out" / "0.png").write_bytes(b"edited")
    before = {line["input"]: line["output"] for line in lines_of()}

    def stop(partial, path):
        if name == "replace" or not path.exists():
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch:
        patch.setattr(f"gen_turbo.manifest.{name}", stop)
        assert generate("--seed", "1") == 130
    with Manifest(folder / "out" / "manifest.jsonl") as manifest:
        assert {path.name for path in manifest.outputs()} == set(before.values())
    assert generate("--seed", "1") == 0
    after = {line["output"] for line in lines_of()}
    left = {path.name for path in (folder / "out").glob("*.png")} - after
    assert left == ({"0.png"} if name == "add_name" else set())


def test_a_name_stays_with_its_image(folder, monkeypatch):
    """Catches another image of the same name that takes the place of a result while that is away."""
    (folder / "other").mkdir()
    image(9).save(folder / "other" / "0.png")
    assert generate() == 0
    (folder / "out" / "0.png").unlink()
    assert cli.main(["caption-generate", "other", "--output", "out"]) == 0
    assert not (folder / "out" / "0.png").exists()
    assert generate() == 0
    outputs = {line["input"]: line["output"] for line in lines_of()}
    assert outputs[str(folder / "in" / "0.png")] == "0.png" and len(set(outputs.values())) == 4


def test_what_another_run_holds_is_left_to_it(folder, capsys):
    """Catches an item that two runs make, and one that stays claimed when its run ends by an exception."""
    settings = {}

    def claimed_elsewhere(images):
        with Manifest(Path("out/manifest.jsonl")) as other:
            settings["taken"] = [item.path.name for item in other.claim(iter(items), 9)]
            raise KeyboardInterrupt

    items = [Item.of(path, "other settings") for path in sorted((folder / "in").iterdir())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioning, "build_pipeline", lambda config, processor: GenerateStub(claimed_elsewhere))
        assert generate("batch_size=2") == 130
    assert settings["taken"] == ["2.png"]
    with Manifest(Path("out/manifest.jsonl")) as other:
        assert len(other.claim(iter(items[:1]), 9)) == 1
        capsys.readouterr()
        assert generate() == 0
        assert "2 done, 0 finished before, 0 failed, 1 in other runs" in capsys.readouterr().err
    assert generate() == 0
    assert "1 done, 2 finished before, 0 failed\n" in capsys.readouterr().err


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    """Catches a database in the current folder."""
    monkeypatch.chdir(tmp_path)
    items = [Item(tmp_path / f"{number}.png", "d", "s") for number in range(3)]
    with Manifest(None) as manifest:
        walk = iter(items)
        assert manifest.claim(walk, 2) == items[:2]
        manifest.keep(items[0], {"caption": "a"})
        manifest.fail(items[1], "no")
        assert [manifest.finished(item) for item in items] == [True, False, False]
        assert manifest.claim(iter(items), 3) == items[1:]
    assert not list(tmp_path.iterdir())
