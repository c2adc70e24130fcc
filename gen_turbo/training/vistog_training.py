"""Settings of the training of VisToG's learned parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gen_turbo.schemas import check_count, check_finite


@dataclass(frozen=True)
class VisToGTraining:
    """Settings of a training in two stages, as the paper has them.

    Attributes:
        align_steps: Steps of the first stage: semantic tokens, grouping layer and projector.
        tune_steps: Steps of the second stage: the same at a lower rate, with the language model's adapter if wanted.
        align_rate: Learning rate of the first stage; it rises over a tenth of the steps and falls along a cosine.
        tune_rate: Learning rate of the second stage.
        has_connector: Whether a copy of the projector is trained too.
        lora_rank: Rank of an adapter on the language model's queries and values, made by peft in the second stage. It
            stays on the model and is written beside the result, to be loaded by `model.load_adapter`; 0 makes none.
        max_new_tokens: The longest answer of the teacher.
        num_lessons: Batches whose answers are held at once and gone through in turn. Raising it varies more and holds
            the logits of more answers.
        num_rounds: How often these are gone through before the next ones are drawn and answered. Raising it saves the
            full model's part of the work.
        num_drawn: For each question that is learned from, how many are drawn and answered: those whose answers the
            grouped model moves furthest stay. Raising it finds what is still wrong where most is right.
        seed: Of the noise in the assignments.
        save_every_s: Seconds between checkpoints.
    """

    align_steps: int = 600
    tune_steps: int = 200
    align_rate: float = 1e-3
    tune_rate: float = 2e-4
    has_connector: bool = True
    lora_rank: int = 0
    max_new_tokens: int = 16
    num_lessons: int = 16
    num_rounds: int = 3
    num_drawn: int = 1
    seed: int = 0
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        check_finite(self)
        for setting in ("align_steps", "tune_steps", "align_rate", "tune_rate", "lora_rank", "save_every_s"):
            if getattr(self, setting) < 0:
                raise ValueError(f"{setting} must not be negative; got {getattr(self, setting)}")
        for setting in ("max_new_tokens", "num_lessons", "num_rounds", "num_drawn"):
            check_count(setting, getattr(self, setting))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.align_steps:
            peak, place, steps = self.align_rate, step, self.align_steps
        else:
            peak, place, steps = self.tune_rate, step - self.align_steps, self.tune_steps
        rise = min(1.0, 10 * (place + 1) / steps)
        return peak * rise * 0.5 * (1 + math.cos(math.pi * place / steps))

    def lesson(self, step: int) -> int:
        """The number of the batch that a step learns from."""
        block, place = divmod(step, self.num_lessons * self.num_rounds)
        return block * self.num_lessons + place % self.num_lessons
