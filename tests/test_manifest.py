"""The manifest: what is in its folder stays what it is, whoever wrote it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from gen_turbo.commands import cli
from gen_turbo.config import ConfigError
from gen_turbo.database import open_database
from gen_turbo.lines import Item, names_of
from gen_turbo.manifest import Manifest
from tests.manifests import content_of, generate, lines_of

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
    assert generate() == 0
    assert {path for path in folder.rglob("*") if out not in path.parents} == outside
    assert (out / "notes.png").read_bytes() == b"mine"
    assert sorted(line["output"] for line in lines_of()) == ["0.png", "1.png", "2.png"]
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
    assert generate() == 0
    assert sorted(path.name for path in folder.iterdir()) == ["in", "out"]
    assert lines_of()[0]["output"] == "0.png"


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
    before = content_of(folder / "in")
    assert cli.main(["caption", "in", "--output", "said.jsonl"]) == 2
    assert "is no manifest" in capsys.readouterr().err
    assert Path("said.jsonl").read_text() == text
    assert content_of(folder / "in") == before and sorted(p.name for p in folder.iterdir()) == ["in", "said.jsonl"]


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
        assert generate() == 2
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
    assert generate() == 0
    assert [(out / name).read_bytes() for name in taken[:2]] == [b"mine"] * 2
    assert (out / taken[2]).is_symlink() and not (folder / "nowhere").exists()
    made = {line["output"] for line in lines_of()}
    assert len(made) == 3 and not made & set(taken)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in made)


def test_lines_without_their_database_are_imported(folder, capsys):
    """Catches results that are made again because the database was not copied, and own images taken for foreign."""
    assert generate() == 0
    before = content_of(folder / "out")
    (folder / "out" / "manifest.sqlite").unlink()
    capsys.readouterr()
    assert generate() == 0
    assert "0 done, 3 finished before" in capsys.readouterr().err
    after = content_of(folder / "out")
    assert {**after, "manifest.sqlite": b""} == {**before, "manifest.sqlite": b""}
    (folder / "out" / "manifest.sqlite").unlink()
    assert generate("--seed", "1") == 0
    assert {line["output"] for line in lines_of()} == {"0.png", "1.png", "2.png"}


def test_lines_of_older_versions_are_imported(folder, capsys):
    """Catches a manifest without digests of images that is lost, and an empty file that counts as done in it."""
    assert generate() == 0
    old = [{key: value for key, value in line.items() if key != "sha256"} for line in lines_of()]
    failed = {**old[0], "error": "no"}
    text = "".join(json.dumps(line) + "\n" for line in [failed, *old, {**old[2], "error": "then"}])
    (folder / "out" / "manifest.sqlite").unlink()
    (folder / "out" / "manifest.jsonl").write_text(text + '{"input": "half a li')
    (folder / "out" / "1.png").write_bytes(b"")
    capsys.readouterr()
    assert generate() == 0
    assert "1 done, 2 finished before" in capsys.readouterr().err
    assert [line.get("error") for line in lines_of()] == [None, None, None, "then"]
    assert sorted(content_of(folder / "out")) == ["0.png", "1.png", "2.png", "manifest.jsonl", "manifest.sqlite"]


def test_a_line_that_cannot_be_read_loses_nothing(folder, capsys):
    """Catches a folder that is refused for ever after one line that was glued to another, and lines thrown away."""
    assert generate() == 0
    path = folder / "out" / "manifest.jsonl"
    first, second, third = path.read_text().splitlines()
    glued = (
        f"{first[:40]}{second}\n{third}\n"
        + '{"input": NaN}\n{"input": "a", "digest": "b", "settings": "c", "x": 1e999}\n'
    )
    path.write_text(glued)
    (folder / "out" / "manifest.sqlite").unlink()
    capsys.readouterr()
    assert generate() == 0
    assert "2 done, 1 finished before" in capsys.readouterr().err
    assert (folder / "out" / "manifest.jsonl.1.old").read_text() == glued
    assert len(lines_of()) == 3


def test_a_look_makes_no_files(tmp_path):
    """Catches a database that stays behind where the model could not be loaded."""
    item = Item(tmp_path / "x.png", "d", "s")
    with Manifest(tmp_path / "out" / "manifest.jsonl") as manifest:
        assert not manifest.finished(item) and manifest.outputs() == set()
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
