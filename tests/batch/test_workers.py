"""Workers of Ray that die or are not there, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gen_turbo.commands import batch_ray
from gen_turbo.commands.batch_rows import Row
from gen_turbo.commands.batch_work import Job, Outcome
from gen_turbo.config import ConfigError


class FakeRay:
    """Two workers, of which each dies with one item."""

    exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def __init__(self) -> None:
        self.started = 0

    def init(self, **options: Any) -> None:
        """Starts nothing."""

    def shutdown(self) -> None:
        """Ends nothing."""

    def kill(self, actor: Any) -> None:
        """Ends nothing."""

    def remote(self, **options: Any) -> Any:
        """Makes a class of workers."""

        def start() -> Any:
            self.started += 1
            return SimpleNamespace(
                load=SimpleNamespace(remote=lambda job: (1, None)),
                work=SimpleNamespace(remote=lambda row, content: (row.id, object())),
            )

        return lambda cls: SimpleNamespace(remote=start)

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        """The first is done."""
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        """Dies with one item."""
        if isinstance(reference, list):
            return reference
        if reference[0] == "bad":
            raise self.exceptions.RayError("killed")
        return Outcome({})


def test_an_item_that_kills_its_workers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a batch that one item keeps for ever, and workers that are not replaced."""
    ray = FakeRay()
    monkeypatch.setattr(batch_ray, "import_module", lambda name: ray)
    said: list[str] = []
    engine = batch_ray.RayEngine(Job(None, 0, 1), workers=2, address=None, gpus=0, say=said.append)
    engine.submit(Row("bad"), None)
    engine.submit(Row("good"), None)
    found = {row.id: outcome for _ in range(2) for row, outcome in engine.collect()}
    assert found["good"].error is None
    assert found["bad"].error == "3 workers died while working on it: killed"
    assert ray.started == 3 and sum("died" in text for text in said) == 3


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback in place of the command that installs Ray."""

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(batch_ray, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install 'gen_turbo\[ray\]'"):
        batch_ray.RayEngine(Job(None, 0, 1), workers=1, address=None, gpus=0)


def test_a_cluster_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and a cluster with a token of which nothing says where to give it."""

    class Away(FakeRay):
        def init(self, **options: Any) -> None:
            raise ConnectionError(f"no answer from {options['address']}")

    monkeypatch.setattr(batch_ray, "import_module", lambda name: Away())
    with pytest.raises(ConfigError, match=r"cannot reach the cluster a:1; .*RAY_AUTH_MODE=token.*no answer from a:1"):
        batch_ray.RayEngine(Job(None, 0, 1), workers=1, address="a:1", gpus=0)
    with pytest.raises(ConfigError, match="cannot start Ray: no answer from None"):
        batch_ray.RayEngine(Job(None, 0, 1), workers=1, address=None, gpus=0)
