"""The presets among the settings of `gen-turbo bench quality`, what they were chosen from, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gen_turbo.bench.cells import distance, of_one_workload, passed, share_of_flops
from gen_turbo.bench.markdown import table
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.settings import Method, Setting
from gen_turbo.config import config_files, describe, read_yaml
from gen_turbo.methods.turbo import TurboProcessor

PRESETS = ("fidelity", "balanced", "fast")
"""Of configs/preset, those that are for any denoiser."""
FAMILY, CANDIDATES = "presets", "preset candidates"
"""Their records have tables of their own."""
NOISE_DB = 0.5
"""Nearer to each other than this, no setting is nearer to stock."""
_NAME = "preset-{}"
_RATIOS, _RHYTHMS = (0.3, 0.5, 0.7), (3, 5)


def preset_settings() -> list[Setting]:
    """Each preset as it is loaded, and what else it might have been."""
    trees = {name: read_yaml("preset", name) for name in PRESETS}
    made: list[Setting] = [Method(_NAME.format(name), FAMILY, tree.pop("method"), tree) for name, tree in trees.items()]
    for scope in ("attention", "block"):
        for ratio in _RATIOS:
            for every in _RHYTHMS:
                options: dict[str, Any] = {"ratio": ratio, "scope": scope, "restore": "residual"}
                options |= {"full_every": every, "warmup_steps": 1}
                made.append(Method(f"candidate-{scope}-r{ratio:g}-k{every}", CANDIDATES, "turbo", options))
    return made


def measured(folder: Path) -> dict[str, list[BenchRecord]]:
    """The last counted records of presets and candidates, by pipeline with its steps; the dearest first."""
    rows = [row for row in load(folder, "quality") if row.family in (FAMILY, CANDIDATES) and "flops" in row.counts]
    found: dict[str, list[BenchRecord]] = {}
    for row in rows:
        found.setdefault(f"{row.params['pipeline']}, {row.params['steps']} steps", []).append(row)
    return {run: sorted(of_one_workload(of), key=share_of_flops, reverse=True) for run, of in sorted(found.items())}


def better(record: BenchRecord, others: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Which of the others cost less and are nearer to stock."""
    cost, decibels = share_of_flops(record), distance(record)
    return [one for one in others if share_of_flops(one) < cost and distance(one) > decibels + NOISE_DB]


def gain(record: BenchRecord) -> str:
    """Cost, distance to stock and images that show their caption, in a line."""
    return f"{share_of_flops(record):.0%} of FLOPs, {distance(record):.1f} dB, {passed(record.values['passed'])}"


def list_presets(folder: Path = Path(__file__).parent / "records") -> dict[str, str]:
    """What each preset is for and what was measured of it, by name; presets of other methods by their comment."""
    runs = measured(folder)
    lines = {}
    for name, path in config_files("preset").items():
        rows = {run: row for run, of in runs.items() for row in of if row.setting == _NAME.format(name)}
        figures = "; ".join(f"{run}: {gain(row)}" for run, row in rows.items())
        lines[name] = describe(path) + (f" [{figures}]" if figures else "")
    return lines


def presets(folder: Path) -> str:
    """Which setting for what, with what was measured of each."""
    runs, files = measured(folder), config_files("preset")
    by_name = {(run, row.setting): row for run, of in runs.items() for row in of if row.family == FAMILY}
    lines = [
        (
            f'`{TurboProcessor.__name__}.preset("{name}")`',
            describe(files[name]).rstrip("."),
            *(gain(by_name[run, _NAME.format(name)]) if (run, _NAME.format(name)) in by_name else "" for run in runs),
        )
        for name in PRESETS
    ]
    what = "Counted FLOPs of a run over stock's; median PSNR to stock; images that show what their caption says"
    return table(("", "for", *runs), lines, list(by_name.values()), what)


def candidates(folder: Path) -> str:
    """What the presets were chosen from, and which of it another setting beats in cost and in distance."""
    runs = measured(folder)
    lines = [
        (
            f"{run}: {row.setting}",
            f"{share_of_flops(row):.2f}",
            f"{distance(row):.1f}",
            passed(row.values["passed"]),
            ", ".join(one.setting for one in better(row, of)[:1]),
        )
        for run, of in runs.items()
        for row in of
    ]
    rows = [row for of in runs.values() for row in of]
    return table(("", "counted", "PSNR to stock, dB", "check passed", "beaten by"), lines, rows, "Counted, not timed")
