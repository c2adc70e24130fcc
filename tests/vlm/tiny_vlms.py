"""Tiny real vision-language models with random weights, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.vlm.tiny_kit import IMAGE, PAD, TinyVlm
from tests.vlm.tiny_llava import LLAVAS
from tests.vlm.tiny_more import MORE
from tests.vlm.tiny_pooled import POOLED
from tests.vlm.tiny_qwen import QWENS
from tests.vlm.tiny_recent import RECENT

VLMS = {**LLAVAS, **QWENS, **POOLED, **MORE, **RECENT}


@dataclass(frozen=True)
class Prompt:
    """Rows of text lengths and images: each row is a list of ints (that many text tokens) and "i" (an image)."""

    rows: list[list[int | str]]
    side: str = "left"

    def inputs(self, vlm: TinyVlm, seed: int = 0) -> dict[str, Tensor]:
        """Token ids, mask and images."""
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for row in self.rows:
            parts = [
                torch.full((vlm.num_tokens,), IMAGE)
                if part == "i"
                # As long as an image, so that rows with more and with fewer images are of one length.
                else torch.randint(3, 90, (vlm.num_tokens if part == "t" else int(part),), generator=generator)
                for part in row
            ]
            rows.append(torch.cat(parts))
        length = max(map(len, rows))
        ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.int64)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if self.side == "left" else slice(0, len(row))
            ids[index, place], mask[index, place] = row, 1
        counts = [row.count("i") for row in self.rows]
        return {"input_ids": ids, "attention_mask": mask, **vlm.images(counts), **vlm.extra(ids, mask)}


PROMPTS = {
    "one": Prompt([[2, "i", 5]]),
    "even": Prompt([[2, "i", 5], [4, "i", 3]]),
    "padded": Prompt([[2, "i", 7], [1, "i", 2]]),
    "ragged": Prompt([[2, "i", 3, "i", 2], [2, "i", 5, "t"]]),
    "ragged_padded": Prompt([[2, "i", 3, "i", 2], [2, "i", 5], [6]]),
}
