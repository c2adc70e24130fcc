"""The user's line on a CPU: what is composed of steps is the run that was chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stated import FAST

from gen_turbo import TurboProcessor, attach, report
from gen_turbo.bench import choices, cpu
from gen_turbo.bench.gpu.cases import CASES, build, pipeline
from gen_turbo.bench.records import load
from gen_turbo.bench.timing import Timing
from gen_turbo.engine import settling
from gen_turbo.engine.costs.devices import CLASSES
from tests.bench.test_benches import _run

SMALL = replace(next(case for case in CASES if case.name == "pixart-sigma-1024").shrunk(), run_steps=20)


@pytest.fixture
def tiny(monkeypatch):
    """PixArt in its tiny form, on a device on which merging gains at any size."""
    monkeypatch.setattr(settling, "device_class", lambda device: FAST)
    monkeypatch.setitem(CLASSES, "cpu", FAST)
    return replace(SMALL, batch=1)


def test_what_is_composed_is_what_the_line_does(tiny):
    """Catches other layers, another rhythm or another length than a whole run of the line has."""
    loop = pipeline(tiny, build(tiny, torch.device("cpu"), 0))
    choice = cpu.chosen(loop.model, tiny, 20)
    assert choice.layers and choice.rhythm.refreshes + choice.rhythm.reduced == 20
    with attach(loop, TurboProcessor(choices.RATIO)):
        loop(20)
        found = report(loop)
    assert found.choice == str(choice)
    merged = [layer for layer in found.layers if layer.status == "reduced"]
    assert {layer.name for layer in merged} == set(choice.layers)
    assert all(
        (layer.num_full, layer.num_reduced) == (choice.rhythm.refreshes, choice.rhythm.reduced) for layer in merged
    )


def test_a_round_times_a_full_and_a_merged_step(tiny, monkeypatch):
    """Catches a merged step that is timed for a full one, and stock with the processor still attached."""
    loop = pipeline(tiny, build(tiny, torch.device("cpu"), 0))
    seen, block = [], loop.model.transformer_blocks[0].ff
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    full = 256
    for is_stock_last, stock_at in ((False, 0), (True, -1)):
        seen.clear()
        cpu.rounds(loop, 20, is_stock_last)
        # The full step runs on all tokens and on the merged ones.
        assert len(seen) == 4 and seen[stock_at] == full
        assert sorted(seen) == [154, 154, full, full]


def test_a_whole_run_is_the_sum_of_its_steps(tiny):
    """Catches a mean over the two kinds of steps in place of the run's own numbers of each."""
    choice = cpu.chosen(build(tiny, torch.device("cpu"), 0), tiny, 20)
    own = cpu.Kinds(Timing(1, 1), Timing(2.0, 20.0), Timing(0.5, 5.0)).whole(choice)
    full = choice.rhythm.refreshes
    assert own.cpu_s * 20 == pytest.approx(2.0 * full + 0.5 * (20 - full)) and own.wall_s == pytest.approx(
        10 * own.cpu_s
    )


def test_records_resume_and_make_a_table(tmp_path, monkeypatch):
    """Catches a second run that measures again, and a table without one of the columns."""
    monkeypatch.setattr(cpu, "cases", lambda patterns: [SMALL])
    arguments = ("cpu", "--rounds", "2", "--records", str(tmp_path))
    _run(*arguments)
    (record,) = load(tmp_path, "cpu")
    assert len(record.cpu_s) == len(record.baseline_cpu_s) == 2 and min(record.cpu_s) > 0
    monkeypatch.setattr(cpu, "rounds", None)
    _run(*arguments)
    assert len(load(tmp_path, "cpu")) == 1
    assert f"{record.values['expected'][0]:.2f}" in cpu.line(tmp_path)
