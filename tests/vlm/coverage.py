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

Every cell says how many tokens a call of the real class had and kept, at a tiny size with random weights, in the tower
and in the prompt, or has a dash where attaching is refused; the tests compare each with this table, which
`python -m tests.vlm.coverage` writes. Where no other name stands, a class is called `...ForConditionalGeneration`. Most
calls bring two images, BLIP's one, Mllama's two of two tiles each; PAR counts words with image tokens. "Frames" says
that tokens of videos are reduced as those of images are; elsewhere a warning says that a video is read in full.
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
        rows = [(row.num_tokens, row.num_kept) for row in report(model).layers if 0 < row.num_kept < row.num_tokens]
    chains: list[tuple[int, int]] = []
    for tokens, kept in dict.fromkeys(rows):
        if chains and chains[-1][1] == tokens:
            chains[-1] = chains[-1][0], kept
        else:
            chains.append((tokens, kept))
    return ", ".join(f"{tokens}\u2192{kept}" for tokens, kept in chains) or "nothing"


def line(name: str) -> str:
    """The row of one model."""
    kind = type(model_of(name)).__name__
    frames = "yes" if any(kind in family.models and family.frames is not None for family in FAMILIES) else "-"
    cells = [kind.replace("ForConditionalGeneration", ""), name, *(cell(name, column) for column in COLUMNS), frames]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    columns = ["model", "variant", *COLUMNS, "frames"]
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    TABLE.write_text("\n".join([_HEAD, *head, *map(line, NAMES)]) + "\n")
