"""What all parts of `bench gpu` share: what is asked for, what has a record, and how a record reads."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gen_turbo.bench import records
from gen_turbo.bench.gpu.variants import Mode
from gen_turbo.bench.timing import Spread

BENCH = "gpu"
NO_GPU = "no GPU, tiny widths and wall times"
REPEATED = "repeated"
"""The phase of records that count what a model repeats."""
RUNS = ("first", "attached", "detached")
"""Stock for the first time, with ratio 0 attached, and stock once that has been detached."""
_SENTENCE = 300


class BrokenDeviceError(RuntimeError):
    """The device takes no more work from this process."""


@dataclass(frozen=True)
class Wishes:
    """What is asked of a whole benchmark.

    Attributes:
        records: Folder of the records.
        seed: Of weights.
        steps: Of a timed run.
        rounds: Alternating rounds; None for what each case has.
        settings: Names or shell patterns; all where there is none.
        modes: Names of modes; all where there is none.
        began: When, as records write it; a failure since then is not tried again.
    """

    records: Path
    seed: int
    steps: int
    rounds: int | None
    settings: list[str]
    modes: list[str]
    began: str


def origin() -> records.Origin:
    """Where this process measures, beginning with the name of the GPU or with the absence of one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(_origin(), date=now)


@cache
def _origin() -> records.Origin:
    here = records.Origin.here()
    return replace(here, hardware=f"{device_name() or NO_GPU}, {here.hardware}")


def device_name() -> str:
    """The name of the GPU; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def sentence(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_SENTENCE]


def is_finished(wishes: Wishes, setting: str, params: Mapping[str, Any]) -> bool:
    """Whether a cell has a measurement, or has failed in this very benchmark."""
    record = records.found(wishes.records, BENCH, setting, params, wishes.seed)
    return record is not None and (not record.failure or record.origin.date >= wishes.began)


def described(record: records.BenchRecord) -> str:
    """A record in one line."""
    params = record.params
    name = f"{params['model']} {params.get('pixels', '')} {params['mode']}, {record.setting}"
    if record.failure:
        return f"{name}: {record.failure}"
    parts = [f"{name}: {Spread.of([1000 * seconds for seconds in record.wall_s]):.2f} ms" if record.wall_s else name]
    against = {"stock": record.baseline_wall_s, "eager stock": record.values.get("eager_s", [])}
    if params["mode"] == Mode.EAGER:
        del against["eager stock"]
    for text, base in against.items():
        if base:
            parts.append(f"{statistics.median(base) / statistics.median(record.wall_s):.2f}x {text}")
    parts += [f"{value} {name.replace('_', ' ')}" for name, value in record.counts.items()]
    peak = record.values.get("peak_mib", [0])[0]
    return ", ".join([*parts, f"{peak:.0f} MiB"] if peak else parts)


def check_device(error: Exception) -> None:
    """Raises BrokenDeviceError if an error has left the device unusable."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as again:
        raise BrokenDeviceError(sentence(error)) from again
