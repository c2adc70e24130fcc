"""Presets: by name in Python, in YAML and on the command line, with what was measured of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import gen_turbo
from gen_turbo import TurboProcessor
from gen_turbo.bench.cells import share_of_flops
from gen_turbo.bench.presets import PRESETS, better, candidates, list_presets, measured, preset_settings, presets
from gen_turbo.bench.records import BenchRecord, append
from gen_turbo.commands.cli import main
from gen_turbo.config import ConfigError, config_files, load_config
from gen_turbo.factory import build_processor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor

RECORDS = Path(gen_turbo.__file__).parent / "bench" / "records"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_everywhere(name, tmp_path):
    """Catches a preset that YAML or the command line mixes with the settings of the method's own file."""
    processor = TurboProcessor.preset(name)
    path = tmp_path / "own.yaml"
    path.write_text(f"checkpoint: embedded:tiny\nprocessor: {{preset: {name}}}\n")
    assert build_processor(load_config(path).processor) == processor
    assert build_processor({"preset": name}) == processor
    assert build_processor(load_config("sd15", [f"processor.preset={name}"]).processor) == processor
    assert build_processor(load_config("sd15", [("processor", {"preset": name})]).processor) == processor


def test_settings_beside_a_preset_win():
    """Catches a preset that overrules what is told."""
    told = build_processor({"preset": "fast", "ratio": 0.25})
    assert told.ratio == 0.25 and told.full_every == TurboProcessor.preset("fast").full_every
    after = load_config("sd15", ["processor.preset=fast", "processor.ratio=0.25"]).processor
    assert build_processor(after) == told


def test_presets_order_speed_against_fidelity():
    """Catches a preset "fidelity" that merges more than "balanced", and that more than "fast"."""
    ratios = [TurboProcessor.preset(name).ratio for name in ("fidelity", "balanced", "fast")]
    assert ratios == sorted(set(ratios))


def test_a_preset_of_another_method_is_refused():
    """Catches a preset that fails on a setting's name, or is read by a class that does not know it."""
    with pytest.raises(ValueError, match=r"preset 'turbo_vit_llava' is of .*; use TurboVisionProcessor\.preset"):
        TurboProcessor.preset("turbo_vit_llava")
    assert TurboVisionProcessor.preset("turbo_vit_llava").num_removed == 16
    with pytest.raises(ConfigError, match="unknown preset configuration 'best'; known: balanced, fast"):
        TurboProcessor.preset("best")


def counted(name: str, decibels: list[float], flops: int) -> BenchRecord:
    """A record of a preset or candidate at so many FLOPs of 100."""
    (setting,) = [one for one in preset_settings() if one.name == name]
    values = {"psnr_db": decibels, "passed": [1.0, 0.0]}
    params = {"pipeline": "tiny", "steps": 25, **setting.params()}
    counts = {"flops": flops, "stock_flops": 100}
    return BenchRecord("quality", name, setting.family, params, 0, values=values, counts=counts)


def test_list_shows_what_was_measured(tmp_path, capsys):
    """Catches figures that no record holds, and a preset that is not listed."""
    append(tmp_path, counted("preset-balanced", [40.0, 44.0], 80))
    assert list_presets(tmp_path)["balanced"].endswith("[tiny, 25 steps: 80% of FLOPs, 42.0 dB, 1 of 2]")
    assert '| `TurboProcessor.preset("balanced")` |' in presets(tmp_path)
    assert sorted(list_presets(tmp_path)) == sorted(config_files("preset"))
    assert main(["list"]) == 0
    assert "presets:" in capsys.readouterr().out


def test_what_beats_a_preset_is_named(tmp_path):
    """Catches a table that compares at other cost, or calls a setting beaten by what costs more or is no nearer."""
    append(tmp_path, counted("preset-fast", [40.0], 70))
    append(tmp_path, counted("candidate-block-r0.5-k5", [40.2], 60))
    append(tmp_path, counted("candidate-block-r0.3-k3", [50.0], 80))
    assert "preset-fast | 0.70 | 40.0 | 1 of 2 |  |" in candidates(tmp_path)
    append(tmp_path, counted("candidate-block-r0.7-k5", [41.0], 60))
    assert "preset-fast | 0.70 | 40.0 | 1 of 2 | candidate-block-r0.7-k5 |" in candidates(tmp_path)


def test_no_candidate_beats_a_preset_that_ships():
    """Catches presets that were not chosen by the records: one that costs more and is further from stock.

    `scope="auto"` takes what is faster on a device, which counted FLOPs do not know; what beats it is in the table.
    """
    for run, rows in measured(RECORDS).items():
        shipped = [row for row in rows if row.setting.startswith("preset-")]
        assert {row.setting for row in shipped} == {f"preset-{name}" for name in PRESETS}, run
        stated = [row for row in shipped if row.params["options"]["scope"] != "auto"]
        assert stated and all(not better(row, rows) for row in stated), run
        costs = [share_of_flops(row) for row in sorted(shipped, key=lambda row: PRESETS.index(row.setting[7:]))]
        assert costs == sorted(costs, reverse=True), run


def test_the_command_line_takes_a_preset(capsys):
    """Catches a flag that is parsed and forgotten."""
    assert main(["report", "--preset", "best"]) == 2
    assert "unknown preset configuration 'best'" in capsys.readouterr().err
