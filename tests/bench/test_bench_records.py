"""Records on disk."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gen_turbo.bench import records
from gen_turbo.bench.records import BenchRecord


def _record(setting: str = "turbo", **changes: Any) -> BenchRecord:
    values: dict[str, Any] = {
        "bench": "toy",
        "setting": setting,
        "family": "turbo",
        "params": {"ratio": 0.5},
        "cpu_s": [0.5, 0.25],
        "baseline_cpu_s": [1.0, 1.0],
        "wall_s": [0.5, 0.5],
        "baseline_wall_s": [1.0, 1.5],
        "seed": 3,
        "values": {"psnr_db": [40.5, 41.0]},
        "counts": {"attention_flops": 12345678901},
    }
    return BenchRecord(**values | changes)


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    """Catches a field that is written but not read back, or counts that lose digits."""
    record = _record()
    records.append(tmp_path, record)
    assert records.load(tmp_path, "toy") == [record]


def test_right_and_wrong_answers_survive_as_digits() -> None:
    """Catches answers that are read back as one number, or an empty list or other values taken for answers."""
    values = {"passed": [1.0, 0.0, 1.0], "none": [], "psnr_db": [1.0, 0.0, 40.5]}
    record = _record(values=values)
    assert json.loads(record.to_line())["values"] == {"passed": "101", "none": [], "psnr_db": [1.0, 0.0, 40.5]}
    assert BenchRecord.from_line(record.to_line()).values == values


def test_what_was_not_measured_takes_no_room() -> None:
    """Catches empty fields in every line of the repository, and a reader that needs them."""
    nothing: dict[str, Any] = {name: [] for name in ("cpu_s", "baseline_cpu_s", "wall_s", "baseline_wall_s")}
    record = _record(**nothing, family="", seed=0, values={}, counts={})
    assert set(json.loads(record.to_line())) == {"bench", "setting", "family", "params", "seed", "origin"}
    assert BenchRecord.from_line(record.to_line()) == record


def test_a_record_says_where_it_comes_from() -> None:
    """Catches numbers without hardware, versions, commit, command or date."""
    origin = json.loads(_record().to_line())["origin"]
    assert all(origin[name] for name in ("hardware", "versions", "commit", "command", "date"))
    assert "torch" in origin["versions"]


def test_the_last_of_equal_settings_counts(tmp_path: Path) -> None:
    """Catches tables that mix a repeated measurement with the one that it replaces."""
    for seconds in (1.0, 2.0):
        records.append(tmp_path, _record(cpu_s=[seconds]))
    records.append(tmp_path, _record(params={"ratio": 0.75}, cpu_s=[3.0]))
    assert [(r.cpu_s, r.params["ratio"]) for r in records.load(tmp_path, "toy")] == [([2.0], 0.5), ([3.0], 0.75)]


def test_finished_compares_all_parameters(tmp_path: Path) -> None:
    """Catches resuming by name alone, which keeps numbers of other weights, and a seed that is never drawn."""
    records.append(tmp_path, _record())
    assert records.is_finished(tmp_path, "toy", "turbo", {"ratio": 0.5}, 3)
    assert not records.is_finished(tmp_path, "toy", "turbo", {"ratio": 0.5}, 4)
    assert not records.is_finished(tmp_path, "toy", "turbo", {"ratio": 0.5, "weights": "abc"}, 3)
    assert not records.is_finished(tmp_path, "other", "turbo", {"ratio": 0.5}, 3)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    """Catches a half-written line that silently drops a measurement from a table."""
    (tmp_path / "toy.jsonl").write_text('{"bench": "toy"')
    with pytest.raises(ValueError, match="not a benchmark record"):
        records.load(tmp_path, "toy")


def test_two_processes_never_share_a_line(tmp_path: Path) -> None:
    """Catches a long record that is written in pieces, between which another process writes its own."""
    long = {"psnr_db": [float(number) for number in range(5000)]}

    def write(part: int) -> None:
        for number in range(20):
            records.append(tmp_path, _record(f"{part}-{number}", values=long))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert len(records.load(tmp_path, "toy")) == 40
