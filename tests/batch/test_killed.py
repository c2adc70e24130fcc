"""Runs that are killed in the middle, on this machine and on a cluster: nothing is lost or done twice."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gen_turbo.commands import cli
from tests.batch.items import PATIENCE_S, ROOT, Run, images, prompts, results, write


def test_a_run_that_is_killed_twice_loses_and_repeats_nothing(settings: str) -> None:
    """Catches results that exist in memory only, and a run that begins anew."""
    source = str(write(Path("in.jsonl"), prompts(9)))
    for name, count in (("first", 2), ("second", 5)):
        run = Run(source, "--output", "out", "--config", settings)
        run.wait_for(Path("out"), count)
        run.kill()
        times = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
        assert len(times) >= count, name
    assert cli.main(["batch", source, "--output", "out", "--config", settings]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [line["number"] for line in results(Path("out"))] == list(range(9))
    assert len(images(Path("out"))) == 9 and not list(Path("out").glob(".*"))


def test_ray_survives_the_death_of_a_worker_and_of_the_driver(settings: str) -> None:
    """Catches an item that dies with its worker, one that is worked on twice, and results that differ from local."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    source = str(write(Path("in.jsonl"), prompts(12)))
    arguments = (source, "--output", "out", "--config", settings, "--engine", "ray")
    run = Run(*arguments, "--workers", "2")
    run.wait_for(Path("out"), 2)
    first, _ = run.workers()
    os.kill(first, signal.SIGKILL)
    run.wait_for(Path("out"), 5)
    run.kill()
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    said = Run(*arguments).finish()
    assert re.search(r"[0-9]+ done, ([5-9]|1[0-2]) finished before, 0 quarantined", said), said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [line["number"] for line in results(Path("out"))] == list(range(12))
    write(Path("few.jsonl"), prompts(2))
    assert cli.main(["batch", "few.jsonl", "--output", "few", "--config", settings]) == 0
    assert images(Path("few")).items() <= images(Path("out")).items()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a cluster that runs on this machine, with a port and a token of its own, and its process."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    for name, value in (("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", secrets.token_hex(32))):
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Its sockets lie in this folder, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
        ports = [f"--port={port}", "--dashboard-agent-listen-port=0", "--node-ip-address=127.0.0.1"]
        rest = ["--include-dashboard=false", "--object-store-memory=80000000", f"--temp-dir={folder}/t"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        log = Path(folder) / "log"
        with log.open("wb") as file:
            head = subprocess.Popen([*start, *ports, *rest], stdout=file, stderr=file, env=environment)
        try:
            end = time.monotonic() + PATIENCE_S
            while "runtime started" not in (text := log.read_text()):
                assert head.poll() is None and time.monotonic() < end, text
                time.sleep(0.1)
            yield f"127.0.0.1:{port}", head
        finally:
            head.terminate()
            head.wait(PATIENCE_S)


def test_a_cluster_is_reached_by_its_address(settings: str, cluster: tuple[str, subprocess.Popen[bytes]]) -> None:
    """Catches an address that is not read, so that Ray starts here, and a run that ends the cluster with it."""
    address, head = cluster
    source = str(write(Path("in.jsonl"), prompts(2)))
    said = Run(source, "--output", "out", "--config", settings, "--engine", "ray", "--address", address).finish()
    assert "2 done, 0 finished before, 0 quarantined" in said
    (actor,) = re.findall(r"worker (\d+) is ready", said)
    folder = next(Path(one.partition("=")[2]) for one in head.args if one.startswith("--temp-dir="))
    assert list(folder.glob(f"session_latest/logs/*{actor}*")) and head.poll() is None
    assert len(images(Path("out"))) == 2
