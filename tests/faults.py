"""Runs of `gen-turbo caption-generate` that are killed, or meet a full disk, at each point; alone or several at once.

A process of its own, which loads everything once and forks a child for each run:
`python -m tests.faults kill FOLDER 1` tries every point, with 5 instead of 1 every fifth.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gen_turbo import database
from gen_turbo.commands import caption as captioning
from gen_turbo.commands import cli
from gen_turbo.config import load_config
from tests.stub_pipelines import GenerateStub, image

FOREIGN = {"1.png": b"mine", "notes.txt": b"mine too"}
_CHANGES = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "sqlite3.connect")
_POINTS = {"fault": None, "left": 0}
"""What happens in this run, and at how many points from now."""


def main(kind: str, folder: Path, stride: int) -> None:
    """Goes through all points of one kind, and prints how many there were; raises where anything is wrong."""
    for number in range(3):
        (folder / "in").mkdir(exist_ok=True)
        image(number).save(folder / "in" / f"{number}.png")
    # What a run imports is imported once, not in every child.
    captioning.quiet_loading()
    captioning.processors_of(load_config("caption-generate"))
    _watch(folder)
    faults = {"kill": _die, "full": _refuse}
    if kind in faults:
        print(sum(_each_point(folder, is_again, faults[kind], stride) for is_again in (False, True)))
    else:
        print({"limit": _limits, "together": _together}[kind](folder, stride))


def _each_point(folder: Path, is_again: bool, fault: Callable[[], None], stride: int) -> int:
    """A run with a fault at its first point, another at its second, and so on; each is then taken up."""
    for number in range(1, 10_000, stride):
        _fresh(folder)
        if is_again:
            assert _wait(_start(folder, seed=0)) == 0

        code = _wait(_start(folder, seed=1, fault=fault, place=number))
        assert code in (0, 2, -signal.SIGKILL), code
        if code == 0:
            check(folder)
        assert _wait(_start(folder, seed=1)) == 0
        check(folder)
        if not (folder / "hit").exists():
            return number
        (folder / "hit").unlink()
    raise AssertionError("there are no so many points")


def _limits(folder: Path, stride: int) -> int:
    """Runs in which no file may grow beyond a size, which is another one each time."""
    sizes = [*range(0, 6000, 200), *range(6000, 40_000, 1000)][::stride]
    for size in sizes:
        _fresh(folder)
        code = _wait(_start(folder, seed=1, most_bytes=size))
        assert code in (0, 2), (size, code)
        assert _wait(_start(folder, seed=1)) == 0, size
        check(folder)
    return len(sizes)


def _together(folder: Path, stride: int) -> int:
    """Several runs on one folder: none draws what another does; killed ones are taken up."""
    for number in range(3, 40):
        image(number).save(folder / "in" / f"{number}.png")
    rng = random.Random(0)
    for count in (2, 4) * stride:
        _fresh(folder)
        runs = [_start(folder, seed=1, drawn=folder / f"drawn-{index}", delay_s=0.01) for index in range(count)]
        assert [_wait(run) for run in runs] == [0] * count
        check(folder)
        each = [path.stat().st_size for path in folder.glob("drawn-*")]
        assert sum(each) == 40 and len(each) > 1, each
        _fresh(folder)
        runs = [_start(folder, seed=1, delay_s=0.002) for _ in range(count)]
        for run in runs[:-1]:
            time.sleep(rng.random() * 0.1)
            os.kill(run, signal.SIGKILL)
        assert [_wait(run) for run in runs][-1] == 0
        # Where a killed run died last, the next one puts its log into the database.
        assert _wait(_start(folder, seed=1)) == 0
        check(folder)
    return 2 * stride


def check(folder: Path) -> None:
    """Whether every image has one line and one file, and nothing else is there that was not."""
    out = folder / "out"
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["input"] for line in lines) == sorted(map(str, (folder / "in").iterdir())), lines
    made = {line["output"]: line["sha256"] for line in lines}
    assert len(made) == len(lines) and not set(made) & set(FOREIGN)
    expected = {**made, **{name: hashlib.sha256(content).hexdigest() for name, content in FOREIGN.items()}}
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    left = set(there) - set(expected) - {"manifest.jsonl", "manifest.sqlite"}
    assert not left, left
    assert {name: there[name] for name in expected} == expected


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    for path in folder.glob("drawn-*"):
        path.unlink()
    (folder / "out").mkdir()
    for name, content in FOREIGN.items():
        (folder / "out" / name).write_bytes(content)


def _start(
    folder: Path,
    seed: int,
    fault: Callable[[], None] | None = None,
    place: int = 0,
    most_bytes: int | None = None,
    drawn: Path | None = None,
    delay_s: float = 0.0,
) -> int:
    """Starts a run in a child, and gives the child's number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        if fault is not None:
            _POINTS.update(fault=fault, left=place)
        if most_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))

        def draws(images: list) -> None:
            time.sleep(delay_s)
            if drawn is not None:
                with drawn.open("a") as file:
                    file.write("." * len(images))

        captioning.build_pipeline = lambda config, processor: GenerateStub(draws)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = cli.main(["caption-generate", "in", "--output", "out", "--seed", str(seed), "batch_size=2"])
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _point() -> None:
    """Is passed before everything that changes the output folder: files, names, statements of the database."""
    _POINTS["left"] -= 1
    if _POINTS["left"] == 0:
        Path("hit").touch()
        _POINTS["fault"]()


def _watch(folder: Path) -> None:
    def hear(event: str, given: tuple) -> None:
        is_inside = event in _CHANGES and str(given[0]).startswith(("out", str(folder / "out")))
        if is_inside and (event != "open" or (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            _point()

    class Traced(sqlite3.Connection):
        def execute(self, query, *given):
            _point()
            # A killed process loses nothing that the system has: to wait for the disk would only take time.
            return super().execute(query.replace("synchronous = FULL", "synchronous = OFF"), *given)

    connect = sqlite3.connect
    database.sqlite3.connect = lambda *given, **settings: connect(*given, factory=Traced, **settings)
    os.fsync = lambda number: _point()
    sys.addaudithook(hear)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), int(sys.argv[3]))
