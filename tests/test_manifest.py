"""The manifest: what is in its folder stays what it is, whoever wrote it, and whatever ends a run."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gen_turbo.commands import caption as captioning
from gen_turbo.commands import cli
from gen_turbo.config import ConfigError
from gen_turbo.database import open_database
from gen_turbo.lines import Item, names_of
from gen_turbo.manifest import Manifest
from tests.stub_pipelines import GenerateStub, image

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG an image"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder with three images in `in`, and a model that draws them."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        image(number).save(tmp_path / "in" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(captioning, "build_pipeline", lambda config, processor: GenerateStub())
    return tmp_path


def _generate(*arguments: str) -> int:
    return cli.main(["caption-generate", "in", "--output", "out", *arguments])


def _lines(path: str = "out/manifest.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("kind", "stride"), [("kill", 6), ("full", 9), ("limit", 5), ("together", 1)])
def test_nothing_is_lost_doubled_or_left_over(tmp_path, kind, stride):
    """Catches each of these, for kills, full disks and growing files at any point, and for two and four runs at once.

    The points are those of `tests/faults.py`: a fresh folder, and one whose images are all made again.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults", kind, str(tmp_path), str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > {"kill": 150, "full": 150, "limit": 10, "together": 1}[kind]


HOSTILE = [
    "../EVIL.png",
    "/ABSOLUTE.png",
    "..",
    "notes.png",
    "1.png",
    5,
    None,
    ["a"],
    "0.png\0",
    "",
    "0.PNG",
    "sub/0.png",
]


@pytest.mark.parametrize("output", HOSTILE, ids=repr)
def test_a_line_names_only_what_its_input_would_be_given(folder, output):
    """Catches a manifest that came with a folder and has files outside of it, or other ones in it, overwritten."""
    out = folder / "out"
    out.mkdir()
    (folder / "sub").mkdir()
    (out / "notes.png").write_bytes(b"mine")
    input_path = str(folder / "in" / "0.png")
    line = {"input": input_path, "digest": "x", "settings": "y", "output": output}
    (out / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    outside = {path for path in folder.rglob("*") if out not in path.parents}
    assert _generate() == 0
    assert {path for path in folder.rglob("*") if out not in path.parents} == outside
    assert (out / "notes.png").read_bytes() == b"mine"
    assert sorted(line["output"] for line in _lines()) == ["0.png", "1.png", "2.png"]
    assert Path("out/manifest.jsonl.1.old").read_text() == json.dumps(line) + "\n"


def test_a_database_names_only_what_its_input_would_be_given(folder):
    """Catches names that are checked in the file of lines alone."""
    (folder / "out").mkdir()
    item = Item.of(folder / "in" / "0.png", "s")
    database = open_database(folder / "out" / "manifest.sqlite")
    line = json.dumps(item.line({"output": "../EVIL.png", "sha256": "x"}))
    add = "INSERT INTO item VALUES (?, ?, ?, ?, ?, NULL)"
    database.execute(add, (str(item.path).encode(), "../../x", b"../EVIL.png", line, line))
    database.close()
    assert _generate() == 0
    assert sorted(path.name for path in folder.iterdir()) == ["in", "out"]
    assert _lines()[0]["output"] == "0.png"


FOREIGN = {
    "text": "hello",
    "text of lines": "hello\nworld\n",
    "other lines": '{"a": 1}\n',
    "deep": "[" * 100_000 + "\n",
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_of_lines_is_refused(folder, text, capsys):
    """Catches a traceback, and a file of somebody else that is written over."""
    Path("said.jsonl").write_text(text)
    before = _content(folder / "in")
    assert cli.main(["caption", "in", "--output", "said.jsonl"]) == 2
    assert "is no manifest" in capsys.readouterr().err
    assert Path("said.jsonl").read_text() == text
    assert _content(folder / "in") == before and sorted(p.name for p in folder.iterdir()) == ["in", "said.jsonl"]


def test_a_foreign_database_is_refused(folder, capsys):
    """Catches tables put into another program's file, a link that is followed, and text taken for a database."""
    out = folder / "out"
    out.mkdir()
    other = sqlite3.connect(folder / "other.sqlite")
    other.execute("CREATE TABLE mine (a)")
    other.commit()
    other.close()
    for make in (
        lambda path: path.write_bytes((folder / "other.sqlite").read_bytes()),
        lambda path: path.write_text("hello"),
        lambda path: path.symlink_to(folder / "other.sqlite"),
        lambda path: path.symlink_to(folder / "new.sqlite"),
    ):
        path = out / "manifest.sqlite"
        make(path)
        before = (folder / "other.sqlite").read_bytes()
        assert _generate() == 2
        assert "name another output" in capsys.readouterr().err
        assert (folder / "other.sqlite").read_bytes() == before and not (folder / "new.sqlite").exists()
        assert [one.name for one in out.iterdir()] == ["manifest.sqlite"]
        path.unlink()


def test_no_foreign_image_is_written_over(folder):
    """Catches a name that is free of other items but not of other files, also behind a hash."""
    out = folder / "out"
    out.mkdir()
    taken = [name for _, name in zip(range(3), names_of((folder / "in" / "0.png").resolve()), strict=False)]
    for name in taken[:2]:
        (out / name).write_bytes(b"mine")
    (out / taken[2]).symlink_to(folder / "nowhere")
    assert _generate() == 0
    assert [(out / name).read_bytes() for name in taken[:2]] == [b"mine"] * 2
    assert (out / taken[2]).is_symlink() and not (folder / "nowhere").exists()
    made = {line["output"] for line in _lines()}
    assert len(made) == 3 and not made & set(taken)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in made)


def test_a_result_that_was_changed_is_kept_and_made_again(folder, capsys):
    """Catches an edited image that is written over, and a lost, cut or empty one that counts as done."""
    assert _generate() == 0
    out, whole = folder / "out", (folder / "out" / "1.png").read_bytes()
    (out / "0.png").write_bytes(b"edited")
    (out / "1.png").write_bytes(b"")
    (out / "2.png").unlink()
    capsys.readouterr()
    assert _generate() == 0
    assert "3 done, 0 finished before" in capsys.readouterr().err
    assert (out / "0.png").read_bytes() == b"edited" and (out / "1.png").read_bytes() == whole
    outputs = {Path(line["input"]).name: line["output"] for line in _lines()}
    assert outputs["0.png"] != "0.png" and (outputs["1.png"], outputs["2.png"]) == ("1.png", "2.png")


def test_lines_without_their_database_are_imported(folder, capsys):
    """Catches results that are made again because the database was not copied, and own images taken for foreign."""
    assert _generate() == 0
    before = _content(folder / "out")
    (folder / "out" / "manifest.sqlite").unlink()
    capsys.readouterr()
    assert _generate() == 0
    assert "0 done, 3 finished before" in capsys.readouterr().err
    after = _content(folder / "out")
    assert {**after, "manifest.sqlite": b""} == {**before, "manifest.sqlite": b""}
    (folder / "out" / "manifest.sqlite").unlink()
    assert _generate("--seed", "1") == 0
    assert {line["output"] for line in _lines()} == {"0.png", "1.png", "2.png"}


def test_lines_of_older_versions_are_imported(folder, capsys):
    """Catches a manifest without digests of images that is lost, and an empty file that counts as done in it."""
    assert _generate() == 0
    old = [{key: value for key, value in line.items() if key != "sha256"} for line in _lines()]
    failed = {**old[0], "error": "no"}
    text = "".join(json.dumps(line) + "\n" for line in [failed, *old, {**old[2], "error": "then"}])
    (folder / "out" / "manifest.sqlite").unlink()
    (folder / "out" / "manifest.jsonl").write_text(text + '{"input": "half a li')
    (folder / "out" / "1.png").write_bytes(b"")
    capsys.readouterr()
    assert _generate() == 0
    assert "1 done, 2 finished before" in capsys.readouterr().err
    assert [line.get("error") for line in _lines()] == [None, None, None, "then"]
    assert sorted(_content(folder / "out")) == ["0.png", "1.png", "2.png", "manifest.jsonl", "manifest.sqlite"]


def test_a_line_that_cannot_be_read_loses_nothing(folder, capsys):
    """Catches a folder that is refused for ever after one line that was glued to another, and lines thrown away."""
    assert _generate() == 0
    path = folder / "out" / "manifest.jsonl"
    first, second, third = path.read_text().splitlines()
    glued = (
        f"{first[:40]}{second}\n{third}\n"
        + '{"input": NaN}\n{"input": "a", "digest": "b", "settings": "c", "x": 1e999}\n'
    )
    path.write_text(glued)
    (folder / "out" / "manifest.sqlite").unlink()
    capsys.readouterr()
    assert _generate() == 0
    assert "2 done, 1 finished before" in capsys.readouterr().err
    assert (folder / "out" / "manifest.jsonl.1.old").read_text() == glued
    assert len(_lines()) == 3


def test_a_failure_takes_nothing_away(folder, monkeypatch):
    """Catches a result that is forgotten, or its file, because the same image failed under other settings."""
    assert _generate() == 0
    before = _content(folder / "out")

    def refuse(images):
        raise ValueError("no")

    monkeypatch.setattr(captioning, "build_pipeline", lambda config, processor: GenerateStub(refuse))
    assert _generate("--seed", "1") == captioning.SOME_FAILED
    after = _content(folder / "out")
    assert {name: after[name] for name in ("0.png", "1.png", "2.png")} == {
        name: before[name] for name in ("0.png", "1.png", "2.png")
    }
    assert [line.get("error") for line in _lines()] == [None, "no"] * 3
    monkeypatch.setattr(captioning, "build_pipeline", lambda *arguments: pytest.fail("loaded for nothing"))
    assert _generate() == 0


@pytest.mark.parametrize("name", ["replace", "add_name"])
def test_a_name_that_was_planned_and_not_given_is_free_again(folder, monkeypatch, name):
    """Catches a plan that counts as done, whose old image is then left over, and a name that stays taken by it."""
    assert _generate() == 0
    if name == "add_name":
        (folder / "out" / "0.png").write_bytes(b"edited")
    before = {line["input"]: line["output"] for line in _lines()}

    def stop(partial, path):
        if name == "replace" or not path.exists():
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch:
        patch.setattr(f"gen_turbo.manifest.{name}", stop)
        assert _generate("--seed", "1") == 130
    with Manifest(folder / "out" / "manifest.jsonl") as manifest:
        assert {path.name for path in manifest.outputs()} == set(before.values())
    assert _generate("--seed", "1") == 0
    after = {line["output"] for line in _lines()}
    left = {path.name for path in (folder / "out").glob("*.png")} - after
    assert left == ({"0.png"} if name == "add_name" else set())


def test_a_name_stays_with_its_image(folder, monkeypatch):
    """Catches another image of the same name that takes the place of a result while that is away."""
    (folder / "other").mkdir()
    image(9).save(folder / "other" / "0.png")
    assert _generate() == 0
    (folder / "out" / "0.png").unlink()
    assert cli.main(["caption-generate", "other", "--output", "out"]) == 0
    assert not (folder / "out" / "0.png").exists()
    assert _generate() == 0
    outputs = {line["input"]: line["output"] for line in _lines()}
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
        assert _generate("batch_size=2") == 130
    assert settings["taken"] == ["2.png"]
    with Manifest(Path("out/manifest.jsonl")) as other:
        assert len(other.claim(iter(items[:1]), 9)) == 1
        capsys.readouterr()
        assert _generate() == 0
        assert "2 done, 0 finished before, 0 failed, 1 in other runs" in capsys.readouterr().err
    assert _generate() == 0
    assert "1 done, 2 finished before, 0 failed\n" in capsys.readouterr().err


def test_a_look_makes_no_files(tmp_path):
    """Catches a database that stays behind where the model could not be loaded."""
    item = Item(tmp_path / "x.png", "d", "s")
    with Manifest(tmp_path / "out" / "manifest.jsonl") as manifest:
        assert not manifest.finished(item) and manifest.outputs() == set()
    assert not list(tmp_path.iterdir())


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


def test_numbers_that_json_has_not_are_refused(tmp_path):
    """Catches an export that no other program reads."""
    item = Item(tmp_path / "0.png", "d", "s")
    with Manifest(tmp_path / "m.jsonl") as manifest:
        manifest.claim(iter([item]), 1)
        with pytest.raises(ValueError, match="JSON"):
            manifest.keep(item, {"seconds": float("nan")})
        assert not manifest.finished(item)


def test_another_version_is_refused(tmp_path):
    """Catches rows that are read under the names of other columns."""
    database = open_database(tmp_path / "m.sqlite")
    database.execute("ALTER TABLE item ADD COLUMN more")
    database.close()
    with pytest.raises(ConfigError, match="another version"):
        open_database(tmp_path / "m.sqlite")
