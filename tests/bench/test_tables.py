"""Tables and plots from records."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gen_turbo.bench import records
from gen_turbo.bench.readme import with_tables
from gen_turbo.bench.records import BenchRecord
from gen_turbo.bench.tables import NO_RECORDS, TABLES, attention_cost, quality
from gen_turbo.cli import main

COUNTS = {"top_attention_flops": 25, "matching_flops": 9, "stock_top_attention_flops": 100}
MARKED = "before\n<!-- table:quality -->\nold\n<!-- /table -->\nafter\n"


def _record(setting: str = "turbo-copy-r0.5", steps: int = 25, **changes: Any) -> BenchRecord:
    values: dict[str, Any] = {
        "bench": "quality",
        "setting": setting,
        "family": "turbo, copied",
        "params": {"steps": steps, "captions": 3},
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


def test_matching_is_part_of_the_counted_cost() -> None:
    """Catches a cost that flatters methods that search for long."""
    assert attention_cost(_record()) == pytest.approx(0.34)


def test_numbers_of_steps_do_not_mix(tmp_path: Path) -> None:
    """Catches a table of 25 steps with rows of 8."""
    records.append(tmp_path, _record(steps=8))
    assert TABLES["quality"](tmp_path) == NO_RECORDS
    assert "turbo-copy-r0.5" in TABLES["quality8"](tmp_path)


def test_the_command_stands_under_the_table(tmp_path: Path) -> None:
    """Catches numbers that nobody can repeat."""
    record = _record()
    records.append(tmp_path, record)
    last = quality(tmp_path, 25).splitlines()[-1]
    assert record.origin.command in last
    assert record.origin.hardware in last


def test_only_what_stands_between_markers_changes(tmp_path: Path) -> None:
    """Catches a pattern that runs on to a later marker, and a second rewrite that adds lines."""
    records.append(tmp_path, _record())
    once = with_tables(MARKED + MARKED, tmp_path)
    assert once.count("before\n") == once.count("after\n") == 2
    assert "old" not in once
    assert with_tables(once, tmp_path) == once


@pytest.mark.parametrize(
    ("text", "words"),
    [(MARKED.replace("quality", "qualty"), "no table"), (MARKED.replace("<!-- /table -->", ""), "closed")],
)
def test_a_wrong_marker_is_an_error(text: str, words: str, tmp_path: Path) -> None:
    """Catches a mistyped marker under which an old table lives on."""
    with pytest.raises(ValueError, match=words):
        with_tables(text, tmp_path)


def test_the_command_rewrites_and_draws(tmp_path: Path) -> None:
    """Catches a plot that is empty or a file that is not rewritten."""
    for setting, psnr in (("a", 40.0), ("b", 45.0), ("stock", 100.0)):
        values = {"psnr_db": [psnr], "ssim": [0.9], "passed": [1.0]}
        records.append(tmp_path, _record(setting, values=values))
    readme, plot = tmp_path / "README.md", tmp_path / "plot.png"
    readme.write_text(MARKED)
    assert main(["bench", "readme", str(readme), "--records", str(tmp_path), "--plot", str(plot)]) == 0
    assert "| a |" in readme.read_text()
    with Image.open(plot) as image:
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 3


def test_a_plot_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an empty plot that looks like a result."""
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    assert main(["bench", "readme", str(readme), "--records", str(tmp_path), "--plot", str(tmp_path / "plot.png")]) == 2
    assert "gen-turbo bench quality" in capsys.readouterr().err
    assert not (tmp_path / "plot.png").exists()
