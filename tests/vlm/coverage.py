"""Writes COVERAGE.md, the table of vision-language families and places: python -m tests.vlm.coverage."""

from __future__ import annotations

from pathlib import Path

import torch

from gen_turbo import PARProcessor, TurboProcessor, attach, report
from gen_turbo.methods.fastv import FastVProcessor
from gen_turbo.methods.resize import ResizeProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.vlm.families import FAMILIES
from gen_turbo.vlm.settings import Placed
from tests.vlm.test_settings_matrix import FAMILIES as NAMES
from tests.vlm.test_settings_matrix import model_of, run

TABLE = Path(__file__).parent / "COVERAGE.md"
COLUMNS = {
    "before the language model": TurboProcessor(0.5),
    "in the vision tower": TurboVisionProcessor(0.5, place="tower"),
    "grouped in the tower": VisToGVisionProcessor(num_tokens=4),
    "smaller image": ResizeProcessor(0.5),
    "inside the language model": Placed(TurboProcessor(0.5), place="decoder", layer=2),
    "by its attention": FastVProcessor(0.5),
    "PAR": PARProcessor(router="uniform", tokens=0.5, layers=3),
    "words": TurboProcessor(0.5, text_ratio=0.4),
    "weighed keys": TurboProcessor(0.5, proportional_attention=True),
}
_HEAD = """# What works on which vision-language model

Every cell is what a call of the real class at a tiny size with random weights removed, layer by layer, or a dash where
attaching is refused; the tests compare each with this table, which `python -m tests.vlm.coverage` writes. Most calls
bring two images, BLIP's one, Mllama's two of two tiles each. PAR counts image tokens and words, and layers that run on
none. "Frames" says that tokens of videos are reduced as those of images are; elsewhere a warning says that a video is
read in full.
"""


def cell(name: str, column: str) -> str:
    """What a call removes; a dash where the method does not attach."""
    model = model_of(name)
    try:
        attachment = attach(model, COLUMNS[column])
    except ValueError:
        return "-"
    with attachment:
        run(name)
        rows = report(model).layers
    removed = {f"{row.num_tokens} -> {row.num_kept}": None for row in rows if row.num_kept < row.num_tokens}
    return ", ".join(removed) or "nothing"


def line(name: str) -> str:
    """The row of one model."""
    kind = type(model_of(name)).__name__
    has_frames = any(kind in family.models and family.frames is not None for family in FAMILIES)
    cells = [kind, name, *(cell(name, column) for column in COLUMNS), "yes" if has_frames else "-"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    columns = ["model", "tiny", *COLUMNS, "frames"]
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    TABLE.write_text("\n".join([_HEAD, *head, *map(line, NAMES)]) + "\n")
