"""What is read of an input: items, their ids and their seeds, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen_turbo.commands import cli
from gen_turbo.commands.batch_rows import Row, read_rows
from tests.batch.items import Stub, write


def test_formats_hold_the_same_items(tmp_path: Path) -> None:
    """Catches a reader that changes ids, seeds or texts, and ids that depend on the order."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="the batch extra is not installed")
    import pyarrow

    rows = [{"prompt": "a red fox", "seed": 7}, {"prompt": "1e3", "seed": None}, {"prompt": "a red fox", "seed": 7}]
    lines = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text("prompt,seed\na red fox,7\n1e3,\na red fox,7\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_rows(lines, wants_image=False)
    assert [row.prompt for row in found] == ["a red fox", "1e3", "a red fox"]
    assert len({row.id for row in found}) == 3
    assert read_rows(tmp_path / "a.parquet", wants_image=False) == found
    by_text = read_rows(tmp_path / "a.csv", wants_image=False)
    assert [(row.prompt, row.seed) for row in by_text] == [(row.prompt, row.seed) for row in found]
    turned = read_rows(write(tmp_path / "b.jsonl", rows[::-1]), wants_image=False)
    assert {(row.id, row.prompt) for row in turned} == {(row.id, row.prompt) for row in found}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "the id 'a' occurs twice"),
        ('{"prompt": 3}', "item 1: prompt must be a text; got 3"),
        ('{"image": "a.png"}', "item 1: there is no prompt"),
        ('{"prompt": "x", "seed": -1}', "seed must be a whole number from 0"),
        ('{"prompt": "x", "seed": 4294967296}', "seed must be a whole number from 0 to 4294967295"),
        ('{"prompt": "x", "seed": 1.5}', "seed must be a whole number from 0"),
        ('{"prompt": "x", "note": NaN}', "other columns must be plain values"),
        ('{"id": "", "prompt": "x"}', "an id must have 1 to 200 characters"),
        ("no", "line 1 is no JSON"),
        ("[1]", "line 1 must be an object"),
        ("", "holds no items"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_done(
    text: str, message: str, stub: type[Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a batch that stops in the middle because of a line that could have been read first."""
    Path("in.jsonl").write_text(text)
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists() and not stub.worked


def test_seeds_follow_from_ids_alone() -> None:
    """Catches seeds by position, and one seed for all."""
    seeds = [Row(str(number)).seed_of(0) for number in range(1000)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**32 for seed in seeds)
    assert Row("5", prompt="other").seed_of(0) == seeds[5] != Row("5").seed_of(1)
    assert Row("5", seed=3).seed_of(1) == 3
