"""Tables and plots from records."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gen_turbo.bench import records
from gen_turbo.bench.catalogue import RHYTHM_FAMILIES
from gen_turbo.bench.markdown import NO_RECORDS
from gen_turbo.bench.plot import is_own, plot_quality
from gen_turbo.bench.reading_tables import curve_of, share_of_stock
from gen_turbo.bench.records import BenchRecord
from gen_turbo.bench.scopes import FAMILIES
from gen_turbo.bench.tables import TABLES, attention_cost, quality

COUNTS = {"top_attention_flops": 25, "matching_flops": 9, "stock_top_attention_flops": 100}
MARKED = "before\n<!-- table:quality -->\nold\n<!-- /table -->\nafter\n"


def _record(setting: str = "turbo-copy-r0.5", steps: int = 25, **changes: Any) -> BenchRecord:
    values: dict[str, Any] = {
        "bench": "quality",
        "setting": setting,
        "family": "turbo, copied",
        "params": {"pipeline": "tiny", "steps": steps, "captions": 3},
        "cpu_s": [5.0, 4.0, 5.0],
        "baseline_cpu_s": [10.0, 12.0, 5.0],
        "wall_s": [],
        "baseline_wall_s": [],
        "seed": 0,
        "values": {"psnr_db": [40.0, 41.0, 50.0], "ssim": [0.9, 0.9, 0.9], "passed": [1.0, 0.0, 1.0]},
        "counts": COUNTS,
    }
    return BenchRecord(**values | changes)


def test_a_row_shows_medians_with_their_spread(tmp_path: Path) -> None:
    """Catches a ratio of medians, a mean of decibels, and a single number without its spread."""
    records.append(tmp_path, _record())
    row = quality(tmp_path, 25).splitlines()[2]
    assert row == ("| turbo-copy-r0.5 | 2.00 (1.50 to 2.50) | 0.34 | 41.0 (40.5 to 45.5) | 0.900 | 2 of 3 |")


def test_what_was_counted_and_not_timed_has_a_table_of_its_own(tmp_path: Path) -> None:
    """Catches untimed records among timed ones, which have no median, and a cost of another run's stock."""
    counts = {"flops": 30, "stock_flops": 60}
    params = {"pipeline": "tiny-dit", "steps": 28, "captions": 3}
    records.append(tmp_path, _record("par-b0.5", params=params, cpu_s=[], baseline_cpu_s=[], counts=counts))
    row = TABLES["skipping"](tmp_path).splitlines()[2]
    assert row == "| par-b0.5 | 0.50 | 41.0 (40.5 to 45.5) |  | 2 of 3 |"
    assert TABLES["skipping14"](tmp_path) == NO_RECORDS
    assert quality(tmp_path, 28, "tiny-dit") == NO_RECORDS


def _skipped(folder: Path, setting: str, family: str, flops: int, dB: float, **params: Any) -> None:
    shared = {"pipeline": "tiny-dit", "steps": 28, "captions": 3}
    counts = {"flops": flops, "stock_flops": 100}
    record = _record(setting, family=family, params=shared | params, cpu_s=[], baseline_cpu_s=[], counts=counts)
    record.values["psnr_db"] = [dB] * 3
    records.append(folder, record)


def test_rivals_stand_beside_the_schedules_at_equal_cost(tmp_path: Path) -> None:
    """Catches a rival that is held against a schedule of another cost, of another device, or beyond the curve."""
    for device in ({"device": "cuda"}, {}):
        for setting, family, flops, dB in (("par-b0.5", "PAR", 50, 50.0), ("par-b0.25", "PAR", 30, 40.0),
                                           ("steps-11", "fewer steps", 40, 43.0 + len(device)),
                                           ("steps-25", "fewer steps", 90, 60.0)):  # fmt: skip
            _skipped(tmp_path, setting, family, flops, dB, **device)
    rows = [row.split(" | ") for row in TABLES["skipping"](tmp_path).splitlines()[2:6]]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("| steps-25", "0.90", ""), ("| par-b0.5", "0.50", ""),
        ("| steps-11", "0.40", "-2.0"), ("| par-b0.25", "0.30", ""),
    ]  # fmt: skip


def test_merging_is_held_against_skipping_of_the_same_run(tmp_path: Path) -> None:
    """Catches merging that is compared across tokens or steps, and the worst row in place of the best."""
    plain, merged = "PAR, generic", "PAR, generic, with merging"
    for pixels, more in ((128, 0.0), (256, 5.0)):
        _skipped(tmp_path, "generic-b0.75", plain, 80, 60.0, pixels=pixels)
        _skipped(tmp_path, "generic-b0.5", plain, 60, 50.0, pixels=pixels)
        _skipped(tmp_path, "generic-merged-b0.75", merged, 70, 52.0 + more, pixels=pixels)
        _skipped(tmp_path, "generic-merged-b0.5", merged, 65, 40.0, pixels=pixels)
    rows = TABLES["merging"](tmp_path).splitlines()[2:4]
    assert rows == [
        "| 1,024 tokens, 28 steps, merging with steps left out | generic-merged-b0.75 | 0.70 | 52.0 | 55.0 | -3.0 |",
        "| 4,096 tokens, 28 steps, merging with steps left out | generic-merged-b0.75 | 0.70 | 57.0 | 55.0 | +2.0 |",
    ]


def test_merging_that_costs_more_than_any_schedule_is_held_against_the_dearest(tmp_path: Path) -> None:
    """Catches short runs without a row, for nothing was left out at their cost, and a row beside a dearer schedule."""
    _skipped(tmp_path, "generic-b0.75", "PAR, generic", 60, 30.0, pixels=128)
    _skipped(tmp_path, "turbo-late", RHYTHM_FAMILIES[0], 70, 62.0, pixels=128)
    _skipped(tmp_path, "turbo-block-k4-w1", RHYTHM_FAMILIES[0], 50, 99.0, pixels=128)
    rows = TABLES["merging"](tmp_path).splitlines()[2:4]
    assert rows == ["| 1,024 tokens, 28 steps, merging alone | turbo-late | 0.70 | 62.0 | 30.0 | +32.0 |", ""]


def test_curves_of_this_package_are_told_apart() -> None:
    """Catches a family in capitals that is drawn as a rival, and a control that is drawn as a method."""
    own = ("PAR", "turbo + PAR", "turbo, copied", "vistog_vit, trained", "par, budget")
    assert all(is_own(family) for family in own)
    assert not any(
        is_own(family) for family in ("par, tokens, random", "fewer steps", "package tomesd", "random, copied")
    )


def test_matching_is_part_of_the_counted_cost() -> None:
    """Catches a cost that flatters methods that search for long."""
    assert attention_cost(_record()) == pytest.approx(0.34)


def test_numbers_of_steps_do_not_mix(tmp_path: Path) -> None:
    """Catches a table of 25 steps with rows of 8."""
    records.append(tmp_path, _record(steps=8))
    assert TABLES["quality"](tmp_path) == NO_RECORDS
    assert "turbo-copy-r0.5" in TABLES["quality8"](tmp_path)


def test_weights_and_captions_do_not_mix(tmp_path: Path) -> None:
    """Catches rows of an earlier model, or of fewer captions, beside those of the last run."""
    for number, (weights, captions) in enumerate([("old", 50), ("new", 3), ("new", 50), ("new", 50)]):
        params = {"pipeline": "tiny", "steps": 25, "captions": captions, "weights": weights}
        records.append(tmp_path, _record(f"setting-{number}", params=params))
    table = quality(tmp_path, 25)
    assert [number for number in range(4) if f"setting-{number}" in table] == [2, 3]


def test_check_rates_say_of_how_many_steps(tmp_path: Path) -> None:
    """Catches a rate at 8 steps that is read as one at 25."""
    values = {"passed": [1.0, 0.0, 1.0], "stock_passed": [1.0, 1.0, 1.0]}
    for steps in (8, 25):
        records.append(tmp_path, _record("turbo-default", steps, bench="check", values=values))
    rows = TABLES["check"](tmp_path).splitlines()[2:4]
    assert rows == [f"| tiny: turbo-default | {steps} | 2 of 3 | 3 of 3 |" for steps in (25, 8)]


def test_pipelines_do_not_mix(tmp_path: Path) -> None:
    """Catches images of another model under the embedded one's title, and a rate that does not say whose it is."""
    values = {"passed": [1.0], "stock_passed": [1.0]}
    for pipeline, captions in (("tiny", 3), ("tiny-dit", 2)):
        params = {"pipeline": pipeline, "steps": 25, "captions": captions}
        records.append(tmp_path, _record(f"of-{pipeline}", params=params))
        records.append(tmp_path, _record("stock", bench="check", params=params, values=values))
    shown = {name: TABLES[name](tmp_path) for name in ("quality", "quality-dit", "check")}
    assert "| of-tiny |" in shown["quality"] and "of-tiny-dit" not in shown["quality"]
    assert "| of-tiny-dit |" in shown["quality-dit"] and "| of-tiny |" not in shown["quality-dit"]
    assert [row.split(" | ")[0] for row in shown["check"].splitlines()[2:4]] == ["| tiny: stock", "| tiny-dit: stock"]


def test_scopes_have_a_table_of_their_own(tmp_path: Path) -> None:
    """Catches a cell of another ratio, scope or model, and rows that the table of quality swallows."""
    for pipeline, steps, distances in (("tiny", 25, (40.0, 30.0)), ("tiny-dit", 14, (50.0, 20.0))):
        for ratio, distance in zip((0.3, 0.5), distances, strict=True):
            params = {"pipeline": pipeline, "steps": steps, "options": {"ratio": ratio, "scope": "block"}}
            values = {"psnr_db": [distance], "passed": [1.0, 0.0]}
            records.append(tmp_path, _record(f"block-r{ratio}", params=params, values=values, family=FAMILIES[1]))
    lines = TABLES["scopes"](tmp_path).splitlines()
    assert lines[0] == "|  | 0.3 removed | 0.5 removed |" and not lines[4]
    cells = "2.00 x, 40.0 dB, 1 of 2 | 2.00 x, 30.0 dB, 1 of 2"
    assert lines[2:4] == [
        f"| tiny, 25 steps: {FAMILIES[1]} | {cells} |",
        f"| tiny-dit, 14 steps: {FAMILIES[1]} | {cells.replace('40', '50').replace('30', '20')} |",
    ]
    assert TABLES["quality"](tmp_path) == NO_RECORDS


def test_the_plot_has_a_row_for_each_number_of_steps(tmp_path: Path) -> None:
    """Catches a plot that leaves out the run of 8 steps, where nothing temporal helps."""
    sizes = []
    for steps in (25, 8):
        for setting in ("a", "stock"):
            records.append(tmp_path, _record(setting, steps))
        plot_quality(tmp_path, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            sizes.append(image.size)
    assert sizes[1] == (sizes[0][0], 2 * sizes[0][1])


def test_the_command_stands_under_the_table(tmp_path: Path) -> None:
    """Catches numbers that nobody can repeat."""
    record = _record()
    records.append(tmp_path, record)
    last = quality(tmp_path, 25).splitlines()[-1]
    assert record.origin.command in last
    assert record.origin.hardware in last


def _answered(setting: str, cost: int, right: list[float], **options: Any) -> BenchRecord:
    params = {"images": 1, "method": "par" if options else setting, "options": options}
    values = {"caption": right[:1], "color": right[1:]}
    counts = {"cost": cost, "kept": 128, "image_tokens": 256}
    return _record(setting, bench="understanding", family=setting, params=params, values=values, counts=counts)


def test_routing_stands_beside_its_controls(tmp_path: Path) -> None:
    """Catches a control in another layout's row, a mean over kinds instead of questions, and PAR in two tables."""
    records.append(tmp_path, _answered("pool", 500, [0.0, 1.0, 1.0]))
    records.append(tmp_path, _answered("a", 800, [1.0, 1.0, 0.0, 1.0], layers=5, router=None))
    records.append(tmp_path, _answered("b", 700, [0.0, 1.0, 0.0, 0.0], layers=5, router="random"))
    records.append(tmp_path, _answered("c", 600, [1.0, 1.0, 1.0, 1.0], tokens=0.5, layers=5, router="uniform"))
    records.append(tmp_path, _answered("d", 400, [1.0, 0.0], budget=0.4))
    rows = [row.split(" | ") for row in TABLES["routing"](tmp_path).splitlines()[2:5]]
    assert [row[0] for row in rows] == ["| 5 layers", "| 50% of the tokens, 5 layers", "| budget 0.4"]
    assert rows[0][1:4] == ["0.80", "75.0", "2.00 (1.50 to 2.50)"] and rows[0][6:] == ["0.70", "25.0 |"]
    assert rows[1][4:6] == ["0.60", "100.0"] and not rows[1][1].strip()
    assert rows[2][1:3] == ["0.40", "50.0"]
    others = TABLES["understanding"](tmp_path)
    assert "| pool | 128 of 256 | 0.50 |" in others and "| a |" not in others


def test_other_questions_stand_apart(tmp_path: Path) -> None:
    """Catches a table that mixes questions of two draws, the last one's taken for the main, another draw's stock."""
    for setting in ("stock", "pool", "stride"):
        records.append(tmp_path, _answered(setting, 500, [0.0, 1.0, 1.0]))
    for setting, right in (("stock", [1.0, 1.0, 1.0, 0.0]), ("pool", [1.0, 0.0, 1.0, 0.0])):
        records.append(tmp_path, replace(_answered(setting, 500, right), seed=9))
    assert TABLES["understanding"](tmp_path).count("| 66.7 |") == 3
    rows = [row.split(" | ") for row in TABLES["unseen"](tmp_path).splitlines()[2:4]]
    assert [row[0] for row in rows] == ["| stock", "| pool"]
    assert rows[1][2:4] == ["9", "4"] and rows[1][4] == "50.0" and rows[1][5].startswith("66.7 +- ")


def test_the_interval_is_of_pairs() -> None:
    """Catches an interval of two independent samples, which equal answers would not close, and unequal questions."""
    stock = [1.0] * 90 + [0.0] * 10
    assert share_of_stock(stock, stock) == (1.0, 0.0)
    own = [0.0] * 9 + stock[9:]
    ratio, margin = share_of_stock(own, stock)
    # Of 90 pairs where stock is right 81 are: a proportion of .9 of 90, whose standard error is sqrt(.9 * .1 / 90).
    assert ratio == pytest.approx(0.9) and margin == pytest.approx(1.96 * math.sqrt(0.09 / 90), rel=0.01)
    with pytest.raises(ValueError, match="not to the same questions"):
        share_of_stock(own[1:], stock)


def test_curves_part_what_is_routed() -> None:
    """Catches one line through budgets, tokens and layers, and a control on the trained router's line."""
    given: list[dict[str, Any]] = [{"budget": 0.4}, {"tokens": 0.5}, {"tokens": 0.5, "layers": 5, "router": "random"}]
    curves = [curve_of(_answered("a", 1, [1.0, 1.0], **options)) for options in given]
    assert curves == ["par, budget", "par, tokens", "par, tokens and layers, random"]
    assert curve_of(_answered("pool", 1, [1.0, 1.0])) == "pool"
