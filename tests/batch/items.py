"""Items of a batch, what became of them, a worker without a model, and a run in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from gen_turbo.commands import batch_work
from gen_turbo.commands.batch_rows import Row
from gen_turbo.commands.batch_work import Job, Outcome

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(count: int) -> list[dict[str, Any]]:
    """Items of which no two have the same seed."""
    return [{"id": f"item {number}", "prompt": "a large red circle", "number": number} for number in range(count)]


def results(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    """The lines of a file of results."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def images(folder: Path) -> dict[str, bytes]:
    """The content of every image."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


class Stub:
    """Gives an image of one color, and fails as often as it was made to."""

    failures: dict[str, int] = {}
    worked: list[str] = []

    def __init__(self, job: Job) -> None:
        pass

    def work(self, row: Row, content: bytes | None) -> Outcome:
        """Fails or gives its number."""
        self.worked.append(row.id)
        if self.failures.get(row.id, 0) > 0:
            self.failures[row.id] -= 1
            return Outcome(error="no such luck")
        return Outcome({"seed": row.seed_of(0)}, batch_work.png_of(Image.new("RGB", (8, 8), "red")))


class Run:
    """A run in a process of its own that can be killed in the middle."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "gen_turbo.commands.cli", "batch", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.log = Path("log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)

    def wait_for(self, folder: Path, count: int) -> None:
        """Waits until so many images are there."""
        end = time.monotonic() + PATIENCE_S
        while len(images(folder)) < count:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """The numbers of the processes that work."""
        return [int(number) for number in re.findall(r"worker (\d+) is ready", self.log.read_text())]

    def kill(self) -> None:
        """Ends the run at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        """Waits for the end."""
        code = self.process.wait(PATIENCE_S)
        assert code == 0, self.log.read_text()[-2000:]
        return self.log.read_text()
