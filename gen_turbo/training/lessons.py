"""Questions with a full model's own answers, and how far another way of running it moves them.

Shape names: B prompts, K of them that stay, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_turbo.vlm.teacher import Answers, Lesson


@dataclass(frozen=True)
class Taught(Answers):
    """A batch of prompts with images, one each, and what the full model says.

    Attributes:
        inputs: What the model's preparer made of them, padded on the left.
    """

    inputs: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], lesson: Lesson) -> Taught:
        """The inputs beside the answers of a teacher."""
        return cls(lesson.answer_BT, lesson.logits_BTV, lesson.counts_BT, dict(inputs))

    def divergence(self, model: Any) -> Tensor:
        """KL(full || model) of each word of the full model's answers, (B, T) nats; zero behind their ends."""
        return self.moved(model(**self.behind(self.inputs), use_cache=False).logits)

    def hardest(self, model: Any, count: int) -> Tensor:
        """Those `count` prompts whose answers the model moves furthest: their places in the batch, in order.

        Most answers are right within a few hundred steps, and teach nothing from then on (selection by loss as in
        Selective-Backprop, arXiv 1910.00762, but by rank).
        """
        with torch.no_grad():
            return self.divergence(model).sum(1).topk(count).indices.sort().values

    def of_rows(self, row_K: Tensor) -> Taught:
        """Some prompts of the batch.

        Raises:
            ValueError: If an input has not one row for each prompt.
        """
        other = sorted(name for name, value in self.inputs.items() if len(value) != len(self.answer_BT))
        if other:
            raise ValueError(f"{', '.join(other)} have no row for each prompt; set num_drawn=1")
        inputs = {name: value[row_K] for name, value in self.inputs.items()}
        return Taught(self.answer_BT[row_K], self.logits_BTV[row_K], self.counts_BT[row_K], inputs)
