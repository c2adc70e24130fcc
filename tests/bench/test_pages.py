"""Pages whose tables are rewritten from records."""

from pathlib import Path

import pytest
from PIL import Image

from gen_turbo.bench import records
from gen_turbo.bench.readme import rewrite, with_tables
from gen_turbo.commands.cli import main
from tests.bench.test_tables import _answered, _record, _skipped

COUNTS = {"top_attention_flops": 25, "matching_flops": 9, "stock_top_attention_flops": 100}
MARKED = "before\n<!-- table:quality -->\nold\n<!-- /table -->\nafter\n"


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
    records.append(tmp_path, _answered("pool", 500, [0.0, 1.0]))
    for steps in (28, 14):
        for setting, flops in (("par-b0.5", 50), ("par-b0.25", 25)):
            _skipped(tmp_path, setting, "PAR", flops, flops, steps=steps)
    readme, plots = tmp_path / "README.md", tmp_path / "plots"
    readme.write_text(MARKED)
    assert main(["bench", "readme", str(readme), "--records", str(tmp_path), "--plots", str(plots)]) == 0
    assert "| a |" in readme.read_text()
    for name in ("quality", "understanding", "skipping"):
        with Image.open(plots / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 3


@pytest.mark.parametrize("bench", ["quality", "understanding"])
def test_a_plot_of_nothing_is_refused(bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an empty plot that looks like a result."""
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    if bench == "understanding":
        records.append(tmp_path, _record())
    assert main(["bench", "readme", str(readme), "--records", str(tmp_path), "--plots", str(tmp_path)]) == 2
    assert f"gen-turbo bench {bench}" in capsys.readouterr().err
    assert not (tmp_path / f"{bench}.png").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Catches an error number in place of a sentence."""
    with pytest.raises(ValueError, match=r"there is no file .*none\.md; name a Markdown file"):
        rewrite(tmp_path / "none.md", tmp_path)
