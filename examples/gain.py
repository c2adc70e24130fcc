"""The image at the top of README: the embedded model stock and accelerated, labelled from the recorded benchmark.

python examples/gain.py --output docs/images/gain.png
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import demo
import torch
from PIL import Image

import gen_turbo
from gen_turbo.bench.cells import median_speedup
from gen_turbo.bench.records import load
from gen_turbo.scenes import captions

RECORDS = Path(gen_turbo.__file__).parent / "bench" / "records"
STEPS = 25
COLUMNS = {
    "stock": None,
    "turbo-correct-r0.75-k3-o1": gen_turbo.TurboProcessor(0.75),
    "turbo-par-b0.41": gen_turbo.PARProcessor(budget=0.41),
}
"""Settings by the name of their record."""


def label(setting: str) -> str:
    """The name of a setting and how many times faster than stock it was recorded."""
    if setting == "stock":
        return "stock, 1 x"
    records = [r for r in load(RECORDS, "quality") if r.setting == setting and r.params["steps"] == STEPS]
    name = type(COLUMNS[setting]).__name__.removesuffix("Processor")
    return f"{name}, {median_speedup(records[-1]):.2f} x faster"


def main() -> None:
    """Draws one row for each caption and one column for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=2, help="rows (default: 2)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps (default: {STEPS})")
    parser.add_argument("--output", type=Path, default=Path("outputs/gain.png"), help="the image that is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = gen_turbo.load_pipeline("tiny", processor=None, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    for seed, caption in enumerate(captions(options.captions, 3)):
        drawn = []
        for setting, processor in COLUMNS.items():
            with gen_turbo.attach(pipe, processor) if processor is not None else nullcontext():
                drawn.append((label(setting), demo.draw(pipe, caption, seed, options.steps).image))
        rows.append((caption, drawn))
    demo.save(options.output, rows)


if __name__ == "__main__":
    main()
