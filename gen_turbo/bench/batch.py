"""`gen-turbo bench batch`: images a minute of `gen-turbo batch`, in one process and with several workers of Ray.

Models are loaded before the clock starts. The order of the settings alternates between rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from gen_turbo import scenes
from gen_turbo.bench import records
from gen_turbo.bench.markdown import table
from gen_turbo.commands.batch import Batch
from gen_turbo.commands.batch_rows import Row
from gen_turbo.commands.batch_work import Job, engine_of
from gen_turbo.commands.caption import MANIFEST, settings_digest
from gen_turbo.config import load_config
from gen_turbo.manifest import Manifest
from gen_turbo.schemas import Settings

BENCH = "batch"
_LOCAL = "local"
_PER_MINUTE = 60


def run(options: argparse.Namespace) -> None:
    """Measures every setting that has no record yet, all of them in turn in each round.

    Raises:
        ConfigError: If the configuration does not fit, or Ray is not installed.
    """
    config = load_config(options.pipeline, [f"steps={options.steps}", f"device={options.device}"])
    params = {"pipeline": options.pipeline, "steps": options.steps, "items": options.items, "device": options.device}
    names = [_LOCAL, *(f"ray-{count}" for count in options.workers)]
    todo = [n for n in names if not records.is_finished(options.records, BENCH, n, params, options.seed)]
    if not todo:
        return
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    with tqdm(total=options.rounds * len(names), desc=BENCH) as bar:
        for number in range(options.rounds):
            for name in names[:: 1 if number % 2 == 0 else -1]:
                found[name].append(_measured(name, config, options))
                bar.update()
    for name in todo:
        cpu, wall, load = (list(part) for part in zip(*found[name], strict=True))
        base = found[_LOCAL]
        record = records.BenchRecord(
            *(BENCH, name, name.partition("-")[0], params, options.seed),
            *(cpu, [one[0] for one in base], wall, [one[1] for one in base]),
            values={"other_load": load},
            origin=records.Origin.here(options.device),
        )
        records.append(options.records, record)


def throughput(folder: Path) -> str:
    """Images a minute by setting, and what the process that submits takes for an image."""
    rows = records.load(folder, BENCH)
    lines = []
    for row in rows:
        items = row.params["items"]
        speed = _PER_MINUTE * items / statistics.median(row.wall_s)
        gain = statistics.median(a / b for a, b in zip(row.baseline_wall_s, row.wall_s, strict=True))
        driver = "" if row.setting == _LOCAL else f"{1000 * statistics.median(row.cpu_s) / items:.1f} ms"
        load = f"{statistics.median(row.values['other_load']):.1f}"
        lines.append((row.setting, f"{speed:.0f}", f"{gain:.2f}", driver, load))
    head = ("", "images a minute", "times local", "CPU time of the driver, an image", "load average before")
    return table(head, lines, rows, "Medians over alternating rounds, without the loading of models")


def _measured(name: str, config: Settings, options: argparse.Namespace) -> tuple[float, float, float]:
    """CPU seconds of this process, seconds that passed, and how many processes ran on this machine before."""
    engine_name, _, workers = name.partition("-")
    rows = [Row(str(number), caption) for number, caption in enumerate(scenes.captions(options.items, options.seed))]
    job = Job(config, options.seed, options.threads)
    gpus = 0.0 if options.device == "cpu" else 1 / max(options.workers)
    ray = {"workers": int(workers or 1), "address": None, "gpus": gpus}
    load = os.getloadavg()[0]
    with TemporaryDirectory() as folder, Manifest(Path(folder) / MANIFEST) as manifest:
        batch = Batch(manifest, rows, Path(folder), settings_digest(asdict(config), None, options.seed))
        with closing(engine_of(engine_name, job, ray, lambda text: None)) as engine:
            start_cpu, start = time.process_time(), time.perf_counter()
            batch.go(engine)
            return time.process_time() - start_cpu, time.perf_counter() - start, load
