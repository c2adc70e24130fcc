"""Records of benchmarks: one JSON line each, with everything needed to judge and to repeat the number."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

COMMIT_VARIABLE = "GEN_TURBO_COMMIT"
"""Environment variable that names the commit of a source that is installed without its history."""
_PACKAGES = ("gen_turbo", "torch", "diffusers", "transformers", "tomesd")


@dataclass(frozen=True)
class Origin:
    """Where a number comes from.

    Attributes:
        hardware: Processor, cores in the machine and threads used.
        versions: Of Python and of the packages that matter.
        commit: Of the source, with "-dirty" behind it where files differed; outside of a checkout what
            the environment says, or "unknown".
        command: What to type to repeat it.
        date: In UTC, to the second.
    """

    hardware: str
    versions: dict[str, str]
    commit: str
    command: str
    date: str

    @classmethod
    def here(cls, device: str = "cpu") -> Origin:
        """Describes this process, with its present number of threads, and the accelerator that it measures on."""
        has_gpu = torch.device(device).type == "cuda"
        hardware = f"{torch.cuda.get_device_name(device)}, {_hardware()}" if has_gpu else _hardware()
        return cls(hardware, _versions(), _commit(), _command(), datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class BenchRecord:
    """One setting of one benchmark, measured.

    Attributes:
        bench: The benchmark's name, which is its file's name too.
        setting: What was measured.
        family: Settings of one family form one curve.
        params: What defines workload and setting; a setting with equal `params` and seed need not run again.
        seed: Of everything drawn.
        cpu_s: CPU seconds of the setting, by round.
        baseline_cpu_s: CPU seconds of the baseline in the same rounds.
        wall_s: As `cpu_s`, in seconds that passed.
        baseline_wall_s: As `baseline_cpu_s`, in seconds that passed.
        values: Other measurements, by name and case: `psnr_db`, `passed`.
        counts: Counted, not measured: `attention_flops`.
        failure: Why there is no measurement; empty where there is one.
        origin: Hardware, versions, commit, command, date.
    """

    bench: str
    setting: str
    family: str
    params: dict[str, Any]
    seed: int
    cpu_s: list[float] = field(default_factory=list)
    baseline_cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    baseline_wall_s: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failure: str = ""
    origin: Origin = field(default_factory=Origin.here)

    def to_line(self) -> str:
        """The record as one line of JSON without spaces; what was measured keeps four significant digits.

        Values that are all 0 or 1, such as thousands of right and wrong answers, are one string of digits. What was
        not measured is left out.
        """
        # Four digits of what was measured are finer than what a table shows, or a machine repeats.
        given = _rounded(dataclasses.asdict(self), 4) | {"params": _rounded(self.params)}
        data = {name: value for name, value in given.items() if name in _NEEDED or value}
        if self.values:
            data["values"] = {name: _digits(values) for name, values in data["values"].items()}
        return json.dumps(data, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> BenchRecord:
        """Reads what `to_line` wrote.

        Raises:
            ValueError: If the line is not a record.
        """
        try:
            data = json.loads(line)
            values = {name: [float(value) for value in given] for name, given in data.get("values", {}).items()}
            return cls(**{**data, "values": values, "origin": Origin(**data["origin"])})
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a benchmark record: {line[:80]!r} ({error}); delete the line") from error


_NEEDED = ("bench", "setting", "family", "params", "seed", "origin")


def append(folder: Path, record: BenchRecord) -> Path:
    """Adds a record to its benchmark's file, which is made if need be, and returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.bench}.jsonl"
    # One write without a buffer, so that two processes never share a line.
    with path.open("ab", buffering=0) as file:
        file.write((record.to_line() + "\n").encode())
    return path


def load(folder: Path, bench: str) -> list[BenchRecord]:
    """Reads the records of one benchmark in order; of those with equal setting, `params` and seed the last."""
    path = folder / f"{bench}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    latest: dict[str, BenchRecord] = {}
    for record in (BenchRecord.from_line(line) for line in lines if line.strip()):
        latest[_key(record.setting, record.params, record.seed)] = record
    return list(latest.values())


def found(folder: Path, bench: str, setting: str, params: Mapping[str, Any], seed: int) -> BenchRecord | None:
    """The record of this setting with exactly these `params` and this seed, if there is one."""
    key = _key(setting, params, seed)
    return next((r for r in load(folder, bench) if _key(r.setting, r.params, r.seed) == key), None)


def is_finished(folder: Path, bench: str, setting: str, params: Mapping[str, Any], seed: int) -> bool:
    """Whether a record of this setting with exactly these `params` and this seed exists."""
    return found(folder, bench, setting, params, seed) is not None


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The words of a command without some options and what follows each up to the next option."""
    kept: list[str] = []
    is_kept = True
    for word in words:
        is_kept = word not in options if word.startswith("--") else is_kept
        kept += [word] if is_kept else []
    return kept


def _key(setting: str, params: Mapping[str, Any], seed: int) -> str:
    return json.dumps([setting, _rounded(dict(params)), seed], sort_keys=True)


def _digits(values: list[Any]) -> str | list[Any]:
    is_of_digits = values and all(value in (0, 1) for value in values)
    return "".join(str(int(value)) for value in values) if is_of_digits else values


def _rounded(value: Any, digits: int = 5) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value


def _hardware() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..", ":!records")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _command() -> str:
    """What was typed, without the folders of this machine."""
    return shlex.join(["gen-turbo", *without(sys.argv[1:], ("--records", "--work"))])
