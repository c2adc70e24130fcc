"""What becomes of an item: one result that depends on nothing else, or a quarantine after some tries."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gen_turbo.commands import cli
from gen_turbo.commands.batch_rows import Row
from tests.batch.items import Stub, images, prompts, results, write


def test_ids_of_any_form_become_files_inside_of_the_folder(stub: type[Stub]) -> None:
    """Catches an id that is a path, and two ids that become one file."""
    names = ["../../a", "/etc/b", "a.b", "a.c", "A", "..", "\u00e9\n", "c" * 190]
    write(Path("in.jsonl"), [{"id": name, "prompt": "x"} for name in names])
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 0
    assert [line["id"] for line in results(Path("out"))] == names
    assert len(images(Path("out"))) == len(names) and {path.name for path in Path().iterdir()} == {"in.jsonl", "out"}


def test_a_failing_item_is_tried_again_and_then_quarantined(
    stub: type[Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches one failure that ends a run, an item that is tried for ever, and one that every run tries again."""
    write(Path("in.jsonl"), prompts(4))
    stub.failures = {"item 1": 2, "item 2": 9}
    command = ["batch", "in.jsonl", "--output", "out"]
    assert cli.main(command) == 1
    assert "item 2: no such luck" in capsys.readouterr().err
    assert [stub.worked.count(f"item {number}") for number in range(4)] == [1, 3, 3, 1]
    assert [line["number"] for line in results(Path("out"))] == [0, 1, 3]
    assert results(Path("out"), "quarantine.jsonl") == [{"id": "item 2", "error": "no such luck"}]
    stub.worked.clear()
    assert cli.main(command) == 1 and not stub.worked
    stub.failures = {}
    assert cli.main([*command, "--retry-quarantined"]) == 0 and stub.worked == ["item 2"]
    assert len(results(Path("out"))) == 4 and results(Path("out"), "quarantine.jsonl") == []


def test_seeds_of_another_version_are_not_mixed(stub, capsys, monkeypatch):
    """Catches a folder half of whose images have seeds that were derived otherwise, and a finished one that is lost."""
    write(Path("in.jsonl"), [*prompts(3), {"id": "own", "prompt": "x", "seed": 7}])
    command = ["batch", "in.jsonl", "--output", "out"]
    stub.failures = {"item 2": 3}
    with monkeypatch.context() as before:
        before.setattr(Row, "seed_of", lambda row, run: row.seed if row.seed is not None else 2**40 + len(row.id))
        assert cli.main(command) == 1
    made, kept = images(Path("out")), results(Path("out"))
    assert cli.main([*command, "--retry-quarantined"]) == 2
    assert "was made with seed 1099511627782 by a version that derived seeds otherwise" in capsys.readouterr().err
    assert (images(Path("out")), results(Path("out"))) == (made, kept)
    # Nothing is left to do, so nothing is mixed.
    write(Path("in.jsonl"), [*prompts(2), {"id": "own", "prompt": "x", "seed": 7}])
    assert cli.main(command) == 0 and len(results(Path("out"))) == 3


@pytest.mark.parametrize("name", ["error", "output", "input", "digest", "settings", "sha256", "quarantined", "tries"])
def test_columns_never_stand_for_what_results_note(name, stub, capsys):
    """Catches a column that makes a finished item a failed one, or one that every run draws again and never finds."""
    write(Path("in.jsonl"), [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x", name: "y"}])
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 2
    assert f"item 2: a column must not be called '{name}'" in capsys.readouterr().err
    assert not stub.worked and not Path("out").exists()


@pytest.mark.parametrize("row", [{"id": "\ud800"}, {"prompt": "\udfff"}, {"note": "\ud800"}, {"\ud800": 1}])
def test_texts_that_are_no_unicode_are_refused_before_the_work(row, stub, capsys):
    """Catches results that cannot be written after everything was drawn, and a reason without its item."""
    write(Path("in.jsonl"), [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x", **row}])
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 2
    assert "item 2: texts must be Unicode" in capsys.readouterr().err and not stub.worked


def test_results_are_a_table_as_well(stub: type[Stub]) -> None:
    """Catches a table that differs from the lines."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="the batch extra is not installed")
    write(Path("in.jsonl"), [{"id": "a", "prompt": "x", "note": 1}, {"id": "b", "prompt": "x", "note": "two"}])
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 0
    table = parquet.read_table("out/results.parquet").to_pylist()
    assert [row["note"] for row in table] == ["1", "two"]
    assert [row["output"] for row in table] == [line["output"] for line in results(Path("out"))]


def test_images_of_a_folder_are_captioned(tmp_path: Path, vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an image that is read by its place, and a bad file that ends the run."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Image.new("RGB", (32, 32), "red").save("in/red.png")
    Path("in/broken.png").write_bytes(b"no image")
    Path("say.yaml").write_text(f"pipeline: caption\ncheckpoint: {vlm}\ndevice: cpu\nmax_new_tokens: 3\n")
    assert cli.main(["batch", "in", "--output", "out", "--config", "say.yaml"]) == 1
    (line,) = results(Path("out"))
    assert line["id"] == "red.png" and line["caption"] and line["tokens"] > 0
    assert [line["id"] for line in results(Path("out"), "quarantine.jsonl")] == ["broken.png"]


def test_an_image_depends_on_its_item_alone(settings: str) -> None:
    """Catches noise that is drawn in the order of work, and a result that its neighbors change."""
    write(Path("a.jsonl"), prompts(3))
    write(Path("b.jsonl"), prompts(3)[::-1][:2])
    for name in "ab":
        assert cli.main(["batch", f"{name}.jsonl", "--output", name, "--config", settings]) == 0
    few, all_of_them = images(Path("b")), images(Path("a"))
    assert len(set(all_of_them.values())) == 3
    assert len(few) == 2 and few.items() <= all_of_them.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "are of the engine ray; add --engine ray"),
        (["--tries", "0"], "tries must be at least 1"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], message: str, stub: type[Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an option that the engine does not read."""
    write(Path("in.jsonl"), prompts(1))
    assert cli.main(["batch", "in.jsonl", "--output", "out", *arguments]) == 2
    assert message in capsys.readouterr().err
