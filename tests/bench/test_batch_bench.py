"""The benchmark of `gen-turbo batch`: images a minute, and what the process that submits takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen_turbo.bench import records
from gen_turbo.bench.batch import BENCH, throughput
from gen_turbo.commands import batch_ray, batch_work, cli
from gen_turbo.commands.batch_rows import Row
from gen_turbo.commands.batch_work import Job, Outcome


class Quick:
    """Stands for both engines: as many items at once as it has workers."""

    worked: list[str] = []

    def __init__(self, job: Job, workers: int = 1, **rest: object) -> None:
        self.room, self._waiting = workers, list[Row]()

    def submit(self, row: Row, content: bytes | None) -> None:
        """Keeps it."""
        self._waiting.append(row)

    def collect(self) -> list[tuple[Row, Outcome]]:
        """Gives the first."""
        row = self._waiting.pop(0)
        self.worked.append(f"{self.room} {row.id}")
        return [(row, Outcome({}))]

    def close(self) -> None:
        """Ends nothing."""


def test_every_setting_does_all_items_in_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a setting that finds the work of another done, and a table that takes one column for another."""
    Quick.worked = []
    monkeypatch.setattr(batch_ray, "RayEngine", Quick)
    monkeypatch.setattr(batch_work, "LocalEngine", Quick)
    command = ["bench", "batch", "--records", str(tmp_path), "--items", "3", "--rounds", "2", "--workers", "2"]
    assert cli.main(command) == 0
    assert len(Quick.worked) == 12 and sum(one.startswith("2 ") for one in Quick.worked) == 6
    assert cli.main(command) == 0 and len(Quick.worked) == 12
    local, ray = records.load(tmp_path, BENCH)
    assert (local.setting, ray.setting) == ("local", "ray-2")
    assert ray.baseline_wall_s == local.wall_s != ray.wall_s and len(ray.wall_s) == 2
    cells = [row.split(" | ") for row in throughput(tmp_path).splitlines()[2:4]]
    assert [row[0] for row in cells] == ["| local", "| ray-2"]
    assert cells[0][2] == "1.00" and float(cells[1][1]) > 0 and cells[1][3].endswith(" ms")
