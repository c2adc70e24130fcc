"""Every benchmark runs at a toy size, writes its records and resumes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_names import OpNames

from gen_turbo.bench import host, quality, tomesd_baseline
from gen_turbo.bench.commands import add_arguments, run
from gen_turbo.bench.primitives import smooth_tokens
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.tables import TABLES
from gen_turbo.bench.timing import Timing, alternate
from tests.tiny_hosts import sd_pipeline


def _run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    threads = torch.get_num_threads()
    try:
        run(parser.parse_args(arguments))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a stock pipeline far smaller than the embedded one, with random weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    sd_pipeline().save_pretrained(folder)
    return str(folder)


def _quality(pipeline: str, folder: Path, *more: str) -> list[BenchRecord]:
    common = ("--records", str(folder / "records"), "--work", str(folder / "work"), "--steps", "4", "--captions", "2")
    _run("quality", "--pipeline", pipeline, *common, "--timed", "1", *more)
    return load(folder / "records", "quality")


def test_same_plan_repeats_what_tomesd_merges() -> None:
    """Catches a comparison of merging speed over different destinations."""
    tokens = smooth_tokens(2, (6, 8), 16, seed=0)
    merge, unmerge = tomesd_baseline.matching(tokens, (6, 8), 20)
    plan, row_BM = tomesd_baseline.same_plan(unmerge, 2, (6, 8), 20)
    theirs = merge(tokens)
    assert plan.num_slots == 28
    torch.testing.assert_close(plan.unmerge(plan.merge(tokens)), unmerge(theirs), rtol=0, atol=1e-6)
    aligned = theirs.gather(1, row_BM[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(plan.merge(tokens), aligned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bench", ["primitives", "layer"])
def test_small_benches_record_both_sides(bench: str, tmp_path: Path) -> None:
    """Catches a record without its baseline, and a second run that measures again."""
    arguments = (bench, "--side", "8", "--width", "32", "--rounds", "2", "--records", str(tmp_path))
    _run(*arguments)
    found = load(tmp_path, bench)
    assert len(found) >= 3
    assert all(len(r.cpu_s) == len(r.baseline_cpu_s) == 2 for r in found)
    before = (tmp_path / f"{bench}.jsonl").read_text()
    _run(*arguments)
    assert (tmp_path / f"{bench}.jsonl").read_text() == before


def test_host_times_the_same_call_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a call timed with its attention, a stock call that merges too, and a second run that measures again."""
    monkeypatch.setattr(host, "WIDTHS", {"sd15": 0.1})
    seen: dict[str, set[str]] = {"own": set(), "stock": set()}

    def noted(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[Timing]]:
        for name, function in functions.items():
            with OpNames() as ops:
                function()
            seen[name].update(ops.names)
        return alternate(functions, rounds)

    monkeypatch.setattr(host, "alternate", noted)
    arguments = ("host", "--rounds", "2", "--records", str(tmp_path))
    _run(*arguments)
    found = load(tmp_path, "host")
    assert [record.setting for record in found] == ["sd15 copied", "sd15 residual"]
    assert all(len(record.cpu_s) == len(record.baseline_cpu_s) == 2 for record in found)
    assert "index_select" in seen["own"] and not seen["stock"] and not seen["own"] & {"addmm", "mm", "bmm"}
    assert "sd15 copied" in TABLES["host"](tmp_path)
    before = (tmp_path / "host.jsonl").read_text()
    _run(*arguments)
    assert (tmp_path / "host.jsonl").read_text() == before


def test_primitives_are_exact(tmp_path: Path) -> None:
    """Catches a faster merge that gives something else."""
    _run("primitives", "--side", "16", "--width", "32", "--rounds", "1", "--records", str(tmp_path))
    values = load(tmp_path, "primitives")[0].values
    assert values["unmerge_bit_equal"] == [1.0]
    assert values["merge_max_error"][0] <= 1e-6


def test_steps_compare_at_equal_coverage(tmp_path: Path) -> None:
    """Catches a Turbo row that reduces other layers than the tomesd row beside it."""
    names = ("tomesd-1level", "turbo-copy-1level")
    _run("step", "--width-scale", "0.1", "--latents", "8", "--steps", "2", "--rounds", "1", "--records",
         str(tmp_path), "--settings", *names)  # fmt: skip
    counts = {r.setting: r.counts["attention_flops"] for r in load(tmp_path, "step")}
    assert counts["tomesd-1level"] == counts["turbo-copy-1level"] < counts["stock"]


@pytest.mark.parametrize(("model", "rival"), [("sdxl", "tomesd-block-1level"), ("flux", "pool-keys-r0.75")])
def test_steps_of_other_models(model: str, rival: str, tmp_path: Path) -> None:
    """Catches blocks that run in full, a rival that reduces another level than Turbo, and a short model unnamed."""
    names = (rival, "turbo-block-1level", "turbo-runs-reuse5-1level")
    _run("step", "--model", model, "--width-scale", "0.1", "--blocks", "1", "--latents", "16", "--steps", "2",
         "--rounds", "1", "--records", str(tmp_path), "--settings", *names)  # fmt: skip
    counts = {r.setting: r.counts["attention_flops"] for r in load(tmp_path, "step")}
    assert counts["turbo-block-1level"] == counts["turbo-runs-reuse5-1level"] < counts["stock"] > counts[rival]
    assert model == "flux" or counts[rival] == counts["turbo-block-1level"]
    assert f"| {model} 16, 1 of each block, {rival} | " in TABLES["step"](tmp_path)


def test_quality_measures_a_setting_once(pipeline: str, tmp_path: Path) -> None:
    """Catches numbers of captions that were not drawn, and a finished setting that is run again."""
    (record,) = _quality(pipeline, tmp_path, "--settings", "turbo-copy-r0.5")
    assert len(record.values["psnr_db"]) == len(record.values["passed"]) == 2
    assert len(record.cpu_s) == len(record.baseline_cpu_s) == 1
    assert 0 < record.counts["top_attention_flops"] < record.counts["stock_top_attention_flops"]
    assert record.counts["top_tokens_least"] == 128
    before = (tmp_path / "records" / "quality.jsonl").read_text()
    _quality(pipeline, tmp_path, "--settings", "turbo-copy-r0.5")
    assert (tmp_path / "records" / "quality.jsonl").read_text() == before


def test_quality_goes_on_where_it_stopped(pipeline: str, tmp_path: Path) -> None:
    """Catches a resumed run that draws finished captions again or trusts a half-written line."""
    (first,) = _quality(pipeline, tmp_path, "--settings", "steps-2")
    (trials,) = (tmp_path / "work").rglob("*.jsonl")
    lines = trials.read_text().splitlines()
    trials.write_text(lines[0] + "\n" + lines[1][:20])
    (tmp_path / "records" / "quality.jsonl").unlink()
    (second,) = _quality(pipeline, tmp_path, "--settings", "steps-2")
    assert second.cpu_s == first.cpu_s
    assert second.values["psnr_db"] == first.values["psnr_db"]


def test_stock_is_equal_to_itself(pipeline: str, tmp_path: Path) -> None:
    """Catches a stock image of another seed, and a reference that an earlier setting has changed."""
    found = _quality(pipeline, tmp_path, "--settings", "tomesd-r0.5", "cache-k2", "stock")
    stock = next(r for r in found if r.setting == "stock")
    assert stock.values["psnr_db"] == [quality.MOST_DB] * 2
    assert all(max(r.values["psnr_db"]) < quality.MOST_DB for r in found if r.setting != "stock")


@pytest.mark.parametrize("timed", ["0", "1"])
def test_parts_in_one_folder_are_the_whole(
    pipeline: str, tmp_path: Path, timed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches parts that draw the same caption, leave one out, write records of a part of the captions, or differ from
    what one process measures; and a last step that draws what is there.
    """
    settings = ("--settings", "turbo-correct-r0.5-k2-o0", "tome-copy-r0.5", "random-copy-r0.5", "--timed", timed)
    whole = _quality(pipeline, tmp_path / "whole", *settings)
    drawn: list[int] = []
    measure = quality._measure
    monkeypatch.setattr(quality, "_measure", lambda *given: drawn.append(given[2]) or measure(*given))
    for part, index in (("2/2", 1), ("1/2", 0)):
        assert not _quality(pipeline, tmp_path / "parts", "--part", part, *settings)
        assert drawn == 3 * [index]
        drawn.clear()
    merged = _quality(pipeline, tmp_path / "parts", *settings)
    shown = [{r.setting: (r.params, r.values, r.counts) for r in found} for found in (whole, merged)]
    assert not drawn and len(merged) == len(whole) == 3 and shown[0] == shown[1]
    assert all(r.counts["flops" if timed == "0" else "attention_flops"] for r in merged)


def test_arithmetic_is_counted_by_different_parts(pipeline: str, tmp_path: Path) -> None:
    """Catches one process that counts all settings while the others wait for it."""
    settings = ("--settings", "turbo-copy-r0.5", "tome-copy-r0.5", "random-copy-r0.5", "--timed", "0")
    _quality(pipeline, tmp_path, *settings)
    texts = [path.read_text() for path in (tmp_path / "work").rglob("*.jsonl")]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    assert {line["index"] for line in lines if "flops" in line} == {0, 1}
    assert sum("flops" in line for line in lines) == 3


def test_larger_images_are_records_of_their_own(pipeline: str, tmp_path: Path) -> None:
    """Catches images of two sizes that are compared with one stock image."""
    found = [_quality(pipeline, tmp_path, "--settings", "steps-2", "--timed", "0", *more)[-1]
             for more in ((), ("--pixels", "64"))]  # fmt: skip
    assert found[1].params["pixels"] == 64 and "pixels" not in found[0].params
    assert len(list((tmp_path / "work").glob("*"))) == 2
    assert found[0].counts["stock_flops"] != found[1].counts["stock_flops"]


def test_check_needs_no_times(pipeline: str, tmp_path: Path) -> None:
    """Catches a check rate that is counted over other captions than stock's."""
    _run("check", "--pipeline", pipeline, "--captions", "2", "--steps", "2", "--records", str(tmp_path), "--work",
         str(tmp_path / "work"), "--settings", "stock", "turbo-copy-r0.5")  # fmt: skip
    found = load(tmp_path, "check")
    assert [r.cpu_s for r in found] == [[], []]
    assert all(len(r.values["passed"]) == 2 for r in found)
    assert found[0].values["passed"] == found[1].values["stock_passed"]


def test_a_width_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    """Catches an error from deep inside group normalisation."""
    with pytest.raises(ValueError, match="multiples of 32"):
        _run("step", "--width-scale", "0.33", "--records", str(tmp_path))
