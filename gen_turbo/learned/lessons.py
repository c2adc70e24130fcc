"""Questions with a full model's own answers, and how far another way of running it moves them.

Shape names: B prompts, K of them that stay, T tokens of an answer, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_turbo.hosts.vlm.teacher import Lesson, grown


@dataclass(frozen=True)
class Taught:
    """A batch of prompts with pictures, one each, and what the full model says.

    Attributes:
        inputs: What the model's preparer made of them, padded on the left.
        answer_BT: The full model's greedy answers.
        logits_BTV: What they were chosen from.
        counts_BT: True up to the end of each answer, the end included.
    """

    inputs: dict[str, Tensor]
    answer_BT: Tensor
    logits_BTV: Tensor
    counts_BT: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], lesson: Lesson) -> Taught:
        """The inputs beside the answers of a teacher."""
        return cls(dict(inputs), lesson.answer_BT, lesson.logits_BTV, lesson.counts_BT)

    def divergence(self, model: Any) -> Tensor:
        """KL(full || model) of each word of the full model's answers, (B, T) nats; zero behind their ends."""
        logits = model(**grown(self.inputs, self.answer_BT), use_cache=False).logits
        own = self.logits_BTV.log_softmax(-1)
        other = logits[:, -own.shape[1] :].float().log_softmax(-1)
        each_BT: Tensor = (own.exp() * (own - other)).sum(-1) * self.counts_BT
        return each_BT

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
        return Taught(inputs, self.answer_BT[row_K], self.logits_BTV[row_K], self.counts_BT[row_K])
