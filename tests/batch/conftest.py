"""Folders and workers of the tests of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gen_turbo.commands import batch_work
from tests.batch.items import Stub

SETTINGS = "pipeline: text-to-image\ncheckpoint: {checkpoint}\ndevice: cpu\nsteps: 2\nheight: 32\nwidth: 32\n"


@pytest.fixture
def settings(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration of the small checkpoint; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SETTINGS.format(checkpoint=tiny_checkpoint))
    return "tiny.yaml"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Stub]]:
    """Items are worked on by the stub."""
    monkeypatch.setattr(batch_work, "Worker", Stub)
    monkeypatch.chdir(tmp_path)
    Stub.failures, Stub.worked = {}, []
    yield Stub
