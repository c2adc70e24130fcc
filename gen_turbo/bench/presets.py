"""The presets among the settings of `gen-turbo bench quality`, and what was measured of them."""

from __future__ import annotations

import statistics
from pathlib import Path

from gen_turbo.bench.cells import median_speedup, of_one_workload, passed
from gen_turbo.bench.markdown import table
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.settings import Method, Setting
from gen_turbo.config import config_files, describe, read_yaml
from gen_turbo.methods.turbo import TurboProcessor

PRESETS = ("fidelity", "balanced", "fast")
"""Of configs/preset, those that are for any denoiser."""
FAMILY = "presets"
"""Their records have a table of their own."""
_NAME = "preset-{}"


def preset_settings() -> list[Setting]:
    """Each preset as it is loaded."""
    trees = {name: read_yaml("preset", name) for name in PRESETS}
    return [Method(_NAME.format(name), FAMILY, tree.pop("method"), tree) for name, tree in trees.items()]


def measured(folder: Path) -> dict[str, dict[str, BenchRecord]]:
    """The last records of each preset, by preset and by pipeline with its steps."""
    rows = [row for row in load(folder, "quality") if row.family == FAMILY and row.cpu_s]
    runs = {(row.params["pipeline"], row.params["steps"]): f"{row.params['pipeline']}, {row.params['steps']} steps"
            for row in rows}  # fmt: skip
    found: dict[str, dict[str, BenchRecord]] = {name: {} for name in PRESETS}
    for key, run in runs.items():
        for row in of_one_workload([row for row in rows if (row.params["pipeline"], row.params["steps"]) == key]):
            found[row.setting.removeprefix(_NAME.format(""))][run] = row
    return found


def gain(record: BenchRecord) -> str:
    """Speed, distance to stock and images that show their caption, in a line."""
    distance = statistics.median(record.values["psnr_db"])
    return f"{median_speedup(record):.2f} x, {distance:.1f} dB, {passed(record.values['passed'])}"


def list_presets(folder: Path = Path(__file__).parent / "records") -> dict[str, str]:
    """What each preset is for and what was measured of it, by name; presets of other methods by their comment."""
    rows = measured(folder)
    lines = {}
    for name, path in config_files("preset").items():
        figures = "; ".join(f"{run}: {gain(record)}" for run, record in rows.get(name, {}).items())
        lines[name] = describe(path) + (f" [{figures}]" if figures else "")
    return lines


def presets(folder: Path) -> str:
    """Which setting for what, with what was measured of each."""
    rows, files = measured(folder), config_files("preset")
    runs = sorted({run for by_run in rows.values() for run in by_run})
    lines = [
        (
            f"`{TurboProcessor.__name__}.preset({name!r})`".replace("'", '"'),
            describe(files[name]).rstrip("."),
            *(gain(by_run[run]) if run in by_run else "" for run in runs),
        )
        for name, by_run in rows.items()
    ]
    records = [record for by_run in rows.values() for record in by_run.values()]
    what = "Medians: times faster than stock by CPU seconds; PSNR to stock; images that show what their caption says"
    return table(("", "for", *runs), lines, records, what)
