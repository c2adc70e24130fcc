"""Workers of a batch as Ray actors, on this machine or on a cluster; all state stays with the process that submits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gen_turbo.commands.batch_rows import Row
from gen_turbo.commands.batch_work import Job, Outcome, Worker
from gen_turbo.commands.failures import sentence
from gen_turbo.config import ConfigError

_MOST_DEATHS = 3
_STORE_BYTES = 200 * 2**20
_UNREACHED = (
    "cannot reach the cluster {address}; this machine must be a node of it, and where it wants a token, set "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
)
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class RayEngine:
    """One model in each of several processes, and one item at a time in each.

    A process that dies is replaced, and its item is submitted again, at most three times.

    Args:
        job: What the workers do.
        workers: How many processes.
        address: Of a running cluster; None starts Ray on this machine, without dashboard and usage statistics.
        gpus: Of each worker; may be a fraction.
        say: Is given a sentence about workers that start and die.

    Raises:
        ConfigError: If Ray is not installed, the cluster is not there, or the model cannot be loaded.
    """

    def __init__(
        self, job: Job, workers: int, address: str | None, gpus: float, say: Callable[[str], None] = print
    ) -> None:
        os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
        try:
            ray: Any = import_module("ray")
        except ImportError as error:
            raise ConfigError("engine ray needs Ray; run: pip install 'gen_turbo[ray]'") from error
        self._ray, self._job, self._gpus, self._say = ray, job, gpus, say
        self.room = workers
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, Row, bytes | None]] = {}
        self._deaths: Counter[str] = Counter()
        own = {"num_cpus": max(workers * job.threads, os.cpu_count() or 1), "object_store_memory": _STORE_BYTES}
        local = {"include_dashboard": False, **own} if address is None else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            what = "cannot start Ray" if address is None else _UNREACHED.format(address=address)
            raise ConfigError(f"{what}: {sentence(error)}") from error
        try:
            self._start(workers)
        except BaseException:
            self.close()
            raise

    def submit(self, row: Row, content: bytes | None) -> None:
        """Gives an item to an idle worker."""
        if not self._idle:
            self._start(1)
        actor = self._idle.pop()
        self._running[actor.work.remote(row, content)] = actor, row, content

    def collect(self) -> list[tuple[Row, Outcome]]:
        """Waits for one or more items; an item whose worker died is submitted again and waited for."""
        finished: list[tuple[Row, Outcome]] = []
        while not finished:
            ready, _ = self._ray.wait(list(self._running), num_returns=1)
            for reference in ready:
                actor, row, content = self._running.pop(reference)
                try:
                    finished.append((row, self._ray.get(reference)))
                    self._idle.append(actor)
                except self._ray.exceptions.RayError as error:
                    self._ray.kill(actor)
                    finished += self._after_death(row, content, error)
        return finished

    def close(self) -> None:
        """Ends the workers, and Ray where it was started here."""
        self._ray.shutdown()

    def _after_death(self, row: Row, content: bytes | None, error: Exception) -> list[tuple[Row, Outcome]]:
        self._deaths[row.id] += 1
        self._say(f"a worker died with {row.id}; another one starts")
        if self._deaths[row.id] >= _MOST_DEATHS:
            reason = sentence(error)[:200]
            return [(row, Outcome(error=f"{_MOST_DEATHS} workers died while working on it: {reason}"))]
        self.submit(row, content)
        return []

    def _start(self, count: int) -> None:
        """Starts workers at once and waits until all have loaded the model."""
        made = self._ray.remote(num_cpus=self._job.threads, num_gpus=self._gpus, max_restarts=0)(_Actor)
        actors = [made.remote() for _ in range(count)]
        try:
            for actor, (number, failure) in zip(
                actors, self._ray.get([actor.load.remote(self._job) for actor in actors]), strict=True
            ):
                if failure is not None:
                    raise ConfigError(failure)
                self._say(f"worker {number} is ready")
                self._idle.append(actor)
        except self._ray.exceptions.RayError as error:
            raise ConfigError(f"a worker died while loading the model: {sentence(error)[:300]}") from error


class _Actor:
    """Lives in a process of its own."""

    def load(self, job: Job) -> tuple[int, str | None]:
        """Loads the model; gives the number of the process and what went wrong."""
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        try:
            self._worker = Worker(job)
        except Exception as error:
            return os.getpid(), sentence(error)
        return os.getpid(), None

    def work(self, row: Row, content: bytes | None) -> Outcome:
        """Works on one item."""
        return self._worker.work(row, content)
