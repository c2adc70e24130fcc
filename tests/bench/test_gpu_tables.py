"""The tables of `bench gpu`, from records as a GPU would write them."""

from pathlib import Path
from typing import Any

from gen_turbo.bench.gpu.tables import denoisers
from gen_turbo.bench.records import BenchRecord, append
from gen_turbo.bench.tables import TABLES


def gpu_record(setting: str, mode: str = "eager", device: str = "NVIDIA H200", **changes: Any) -> BenchRecord:
    """One as a GPU would write it."""
    values: dict[str, Any] = {
        "bench": "gpu",
        "setting": setting,
        "family": "",
        "params": {"model": "sd15", "pixels": "512x512", "mode": mode, "device": device},
        "cpu_s": [],
        "baseline_cpu_s": [],
        "wall_s": [0.010, 0.010, 0.010],
        "baseline_wall_s": [0.012, 0.012, 0.012],
        "values": {"eager_s": [0.025] * 3, "typical_step_s": [0.008] * 3, "peak_mib": [2048.0]},
        "counts": {"kernels": 900, "host_waits": 0},
        "seed": 0,
    }
    return BenchRecord(**values | changes)


def test_the_table_compares_within_a_mode_and_with_eager_stock(tmp_path: Path) -> None:
    """Catches a gain of capture that is told as one of merging, and a failure that looks like nothing measured."""
    for record in (
        gpu_record("block-copy-r0.5", "captured"),
        gpu_record("block-copy-r0.5", "compiled", failure="TimeoutError: stopped"),
        gpu_record("stock", "captured", baseline_wall_s=[0.010] * 3),
        gpu_record("stock", "eager", device="cpu"),
    ):
        append(tmp_path, record)
    text = TABLES["gpu"](tmp_path)
    assert text.startswith("NVIDIA H200:\n")
    assert text.splitlines()[4:6] == [
        "| sd15 512x512 stock |  | 10.0 (10.0 to 10.0) ms; 2.50 |  |  | 900 | 0 | 2.0 |",
        "| sd15 512x512 block-copy-r0.5 |  | 1.20 (1.20 to 1.20), 1.50; 2.50 | failed |  | 900 | 0 | 2.0 |",
    ]
    assert len(text.splitlines()) == 8


def test_two_cards_have_two_tables(tmp_path: Path) -> None:
    """Catches figures of two cards in one block."""
    for device in ("NVIDIA H100", "NVIDIA H200"):
        append(tmp_path, gpu_record("stock", device=device))
    assert denoisers(tmp_path).count("| sd15 512x512 stock |") == 2
