"""`bench gpu` at tiny width, where nothing is captured."""

import argparse
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.bench.commands import add_arguments, run
from gen_turbo.bench.gpu import command, meter, readers, repeats, variants
from gen_turbo.bench.gpu.apart import apart
from gen_turbo.bench.gpu.cases import CASES, Case, build, cases, pipeline
from gen_turbo.bench.gpu.journal import Wishes
from gen_turbo.bench.gpu.pipeline import BarePipeline
from gen_turbo.bench.gpu.tables import denoisers, reading
from gen_turbo.bench.gpu.variants import Mode, prepared, repeated_blocks, twin
from gen_turbo.bench.markdown import NO_RECORDS
from gen_turbo.bench.records import BenchRecord, append, load
from tests.bench.test_gpu_tables import gpu_record
from tests.stated import TurboProcessor
from tests.tiny_hosts import sd_pipeline
from tests.tiny_pipelines import sd3_with_text

CPU = torch.device("cpu")
FULL_OF_TEN, REDUCED_OF_TEN = 4, 6
MODELS = sorted({case.model for case in CASES})


def _run(folder: Path, *arguments: str) -> list[BenchRecord]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    threads = torch.get_num_threads()
    try:
        run(parser.parse_args(["gpu", "--records", str(folder), "--rounds", "1", *arguments]))
    finally:
        torch.set_num_threads(threads)
    return load(folder, "gpu")


@pytest.fixture(scope="module")
def loop() -> BarePipeline:
    """A tiny PixArt in its denoising loop."""
    (case,) = (case.shrunk() for case in cases(["pixart-sigma-1024"]))
    return pipeline(case, build(case, CPU, 0))


def _variant(name: str, is_unet: bool = False) -> variants.Variant:
    return next(v for v in variants.variants("pixart-sigma", is_unet) if v.setting.name == name)


def test_a_run_without_a_gpu_says_so_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches tiny widths that pass for a GPU's figures, a setting without its baseline, and work done twice."""
    arguments = ("--models", "pixart-sigma-1024", "--settings", "attention-0.4", "block-copy-r0.5")
    found = _run(tmp_path, *arguments, "--modes", "eager", "captured")
    assert "no GPU" in capsys.readouterr().out
    assert {(r.setting, r.params["mode"]) for r in found} == {
        (name, mode) for name in ("stock", "attention-0.4", "block-copy-r0.5") for mode in ("eager", "captured")
    }
    assert all(r.origin.hardware.startswith("no GPU, tiny widths") and r.params["device"] == "cpu" for r in found)
    assert all(len(r.wall_s) == len(r.baseline_wall_s) == len(r.values["eager_s"]) == 1 for r in found)
    assert all(len(r.values["step_ms"]) == 10 and r.counts["finite"] == 1 for r in found)
    counts = {r.setting: r.counts["operators"] for r in found if r.params["mode"] == "eager"}
    assert counts["stock"] < counts["attention-0.4"] < 2 * counts["stock"]
    before = (tmp_path / "gpu.jsonl").read_text()
    _run(tmp_path, *arguments, "--modes", "eager", "captured")
    assert (tmp_path / "gpu.jsonl").read_text() == before
    assert denoisers(tmp_path) == reading(tmp_path) == NO_RECORDS


def test_what_is_refused_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one setting's error that ends the benchmark, is lost, or is never tried again."""
    real = variants._applied

    def refusing(pipe: BarePipeline, variant: variants.Variant, mode: Mode) -> Any:
        if variant.setting.name == "attention-0.4":
            raise RuntimeError("not today")
        return real(pipe, variant, mode)

    arguments = ("--models", "pixart-sigma-1024", "--modes", "eager", "--settings", "*-0.4")
    monkeypatch.setattr(variants, "_applied", refusing)
    failures = {r.setting: r.failure for r in _run(tmp_path, *arguments)}
    assert failures == {"stock": "", "turbo-0.4": "", "attention-0.4": "RuntimeError: not today"}
    monkeypatch.undo()
    monkeypatch.setattr(command, "datetime", _InAMinute)
    assert not any(r.failure for r in _run(tmp_path, *arguments))


class _InAMinute:
    """A clock that has gone on: the failure was in an earlier run."""

    @staticmethod
    def now(zone: object) -> "_InAMinute":
        return _InAMinute()

    def isoformat(self, timespec: str) -> str:
        return "9999-01-01T00:00:00+00:00"


def test_no_time_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a budget that nobody looks at, and models that are built only to be put away."""
    assert _run(tmp_path, "--minutes", "0", "--models", "flux", "llava*") == []
    assert "the time is over" in capsys.readouterr().out


def test_the_reading_model_is_measured_in_both_phases(tmp_path: Path) -> None:
    """Catches a cache that is counted for stock alone, and one phase taken for the other."""
    found = _run(tmp_path, "--models", "llava*", "--settings", "divprune-64")
    assert {(r.params["phase"], r.params["batch"]) for r in found} == {
        (phase, batch) for phase in ("prefill", "prefill + 24") for batch in (1, 2)
    }
    assert all(r.counts["kv_bytes"] * 3 < r.counts["stock_kv_bytes"] and r.wall_s and not r.failure for r in found)


def test_a_compiled_model_reads_beside_compiled_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches eager code or a dynamic cache under the name of compiled, and stock in the graphs of an attached model.

    Columns that left the prompt leave places in the cache; where it is dynamic they take no memory.
    """
    monkeypatch.setattr(variants, "COMPILER", "eager")
    plan = [command.reading._Cell("turbo-192", mode, 1, "prefill") for mode in (Mode.EAGER, Mode.COMPILED_CAPTURED)]
    monkeypatch.setattr(command.reading, "_plan", lambda batches: plan)
    eager, compiled = _run(tmp_path, "--models", "llava*")
    assert [r.params["mode"] for r in (eager, compiled)] == [cell.mode for cell in plan]
    assert not eager.failure and not compiled.failure
    assert eager.counts["kv_bytes"] < 0.5 * eager.counts["stock_kv_bytes"] < 0.5 * compiled.counts["kv_bytes"]
    assert compiled.counts["graphs"] > 0 and eager.counts["operators"] > 0
    assert compiled.values["stock_first_run_s"][0] > 5 * compiled.baseline_wall_s[0]


def test_stock_is_asked_whether_it_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that compares a run with itself, and one that leaves deterministic algorithms on."""
    found = _run(tmp_path, "--models", "llava*", "--settings", "identity")
    assert [(r.params["phase"], r.params["batch"]) for r in found] == [("repeated", 2)]
    runs = ("first", "attached", "detached")
    same = dict.fromkeys((*runs, *(f"deterministic_{run}" for run in runs)), 0)
    assert found[0].counts == {"logits": 4 * 2 * 2004} | same
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(repeats, "build_processor", lambda given: TurboProcessor(0.5))
    counts = repeats.differing(readers.made(0), 1)
    assert {name for name, number in counts.items() if number} == {"logits", "attached", "deterministic_attached"}
    said = gpu_record("identity", params=found[0].params | {"device": "NVIDIA H200"}, wall_s=[], counts=counts)
    append(tmp_path, said)
    assert f"as torch comes 0 in its first run, {counts['attached']} with ratio 0 attached, 0 after" in reading(
        tmp_path
    )


@pytest.mark.parametrize("case", [cases([model])[0].shrunk() for model in MODELS], ids=lambda case: case.name)
def test_the_loop_is_a_run_of_a_pipeline_to_the_engine(case: Any) -> None:
    """Catches steps that are taken for runs, runs for one, and a tiny model on which nothing is left to merge."""
    made = pipeline(case, build(case, CPU, 0))
    with attach(made, TurboProcessor(0.5)):
        first, second = made(10), made(10)
        layers = [layer for layer in report(made.model).layers if layer.num_reduced]
    assert layers and {(s.num_full, s.num_reduced) for s in layers} == {(2 * FULL_OF_TEN, 2 * REDUCED_OF_TEN)}
    assert torch.equal(first, second) and not torch.equal(first, made(10))


def test_times_fall_and_every_run_has_its_own(loop: BarePipeline) -> None:
    """Catches one timestep tensor for all runs, by which an engine tells runs apart."""
    loop(4)
    before = loop.scheduler.timesteps
    loop(4)
    assert loop.scheduler.timesteps is not before
    assert all(a > b for a, b in zip(before[:-1], before[1:], strict=True))


def test_a_twin_has_the_weights_and_nothing_else(loop: BarePipeline) -> None:
    """Catches twelve billion weights held twice, and a stock that has the setting of its twin."""
    other = twin(loop.model)
    assert all(a is b for a, b in zip(loop.model.parameters(), other.parameters(), strict=True))
    stock = loop(3)
    with prepared(loop, _variant("attention-copy-r0.5"), Mode.EAGER) as changed:
        assert not torch.equal(changed(3), stock) and torch.equal(loop(3), stock)


def test_captured_stock_goes_through_this_package(monkeypatch: pytest.MonkeyPatch, loop: BarePipeline) -> None:
    """Catches a bare model under the name of captured stock, and graphs where none are asked for."""
    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(variants, "_attached", lambda pipe, processor, graphs: _noted(asked, pipe, processor, graphs))
    for name, mode in (("stock", Mode.CAPTURED), ("attention-0.4", Mode.EAGER), ("turbo-0.4", Mode.EAGER)):
        with prepared(loop, _variant(name), mode):
            pass
    assert asked == [("IdentityProcessor", True), ("TurboProcessor", False), ("TurboProcessor", "auto")]
    with pytest.raises(ValueError, match="tomesd-r0.5 is no method of this package"):
        variants._applied(loop, _variant("tomesd-r0.5", is_unet=True), Mode.CAPTURED)


def _noted(asked: list[tuple[str, object]], pipe: BarePipeline, processor: Any, graphs: object) -> Any:
    asked.append((type(processor).__name__, graphs))
    return attach(pipe, IdentityProcessor())


@pytest.mark.parametrize("model", MODELS)
def test_repeated_blocks_are_known_of_every_model(model: str) -> None:
    """Catches a compiled mode that compiles nothing where diffusers names no blocks."""
    assert len(repeated_blocks(build(cases([model])[0].shrunk(), CPU, 0))) >= 2


def test_compiled_is_the_twin_alone(monkeypatch: pytest.MonkeyPatch, loop: BarePipeline) -> None:
    """Catches compiled code on the very model that stands for eager stock."""
    monkeypatch.setattr(variants, "COMPILER", "eager")
    with variants.compiler_limits(), prepared(loop, _variant("stock"), Mode.COMPILED) as compiled:
        torch.testing.assert_close(compiled(3), loop(3))
        assert all(block._compiled_call_impl is not None for block in repeated_blocks(compiled.model))
        assert all(block._compiled_call_impl is None for block in repeated_blocks(loop.model))
    variants.forget_compiled()


def test_loops_are_timed_in_turn() -> None:
    """Catches A A A B B B, which times a card that grows warm."""
    order: list[str] = []

    def of(name: str) -> meter.Steps:
        def run_once(steps: int, before: Any) -> torch.Tensor:
            order.append(name)
            for step in range(steps + 1):
                before(step)
            return torch.zeros(1)

        return run_once

    traces = meter.alternated({"a": (of("a"), 2), "b": (of("b"), 5)}, 2)
    assert order == ["a", "b", "a", "b"]
    assert [len(trace.steps_s) for trace in traces["b"]] == [5, 5]


def test_what_takes_too_long_is_stopped() -> None:
    """Catches a compiler that takes the whole budget."""
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="stopped after"), meter.limited(0.1):
        time.sleep(5)
    assert time.monotonic() - began < 2


def test_every_model_of_the_catalogue_is_found_by_pattern() -> None:
    """Catches a misspelt model that is silently not measured."""
    assert [case.name for case in cases(["sd15*"])] == ["sd15-512", "sd15-1024"]
    assert [case.name for case in cases(["flux"])] == ["flux-1024"]
    with pytest.raises(ValueError, match="no model matches 'sd16'; there are: sd15-512"):
        cases(["sd16"])


@pytest.mark.parametrize("part", ["", "transformer"])
def test_the_users_own_model(part: str, tmp_path: Path) -> None:
    """Catches inputs of another size than the model's, and times that its scheduler does not know."""
    pipe = sd3_with_text() if part == "transformer" else sd_pipeline()
    pipe.save_pretrained(tmp_path / "own")
    found = _run(tmp_path, "--model", str(tmp_path / "own" / part), "--settings", "turbo-0.4", "--modes", "eager")
    assert [r.setting for r in found] == ["stock", "turbo-0.4"] and not any(r.failure for r in found)
    assert all(r.params["model"] == (part or "own") for r in found)


def test_a_process_that_dies_costs_one_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Catches a crash that takes the other settings with it, and one that is met again and again."""
    monkeypatch.setattr(command, "_begin_on_device", lambda: None)
    wishes = Wishes(tmp_path, 0, 10, 1, [], [], "2000-01-01T00:00:00+00:00")

    def work(announce: Any, deadline: float) -> int:
        if not load(tmp_path, "gpu"):
            announce(gpu_record("block-copy-r0.5", failure="the process ended").to_line())
            os.kill(os.getpid(), signal.SIGKILL)
        append(tmp_path, gpu_record("spans-copy-r0.5"))
        return 0

    command._supervised(work, time.monotonic() + 30, wishes)
    failures = {r.setting: r.failure for r in load(tmp_path, "gpu")}
    assert failures == {"block-copy-r0.5": "the process ended (exit code -9)", "spans-copy-r0.5": ""}


def test_a_process_that_hangs_is_ended() -> None:
    """Catches a kernel without end that holds the whole benchmark."""
    began = time.monotonic()
    assert apart(lambda announce: time.sleep(60) or 0, 0.2).code < 0
    assert time.monotonic() - began < 20


def test_the_users_line_is_measured_over_whole_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a short run in the place of the pipeline's own, for which other layers and rhythms are chosen."""
    case = replace(cases(["pixart-sigma-1024"])[0].shrunk(), run_steps=12)
    monkeypatch.setattr(Case, "shrunk", lambda self: case)
    arguments = ("--models", "pixart-sigma-1024", "--modes", "eager", "--settings", "*-0.4")
    found = {r.setting: r for r in _run(tmp_path, *arguments)}
    assert {name: r.params["steps"] for name, r in found.items()} == {"stock": 10, "turbo-0.4": 12, "attention-0.4": 10}
    assert len(found["turbo-0.4"].values["step_ms"]) == 12
