"""The control that removes random tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap

_LARGEST_SEED = 2**31 - 1
"""A generator reads 32 bits: seeds beyond them would draw what smaller ones draw."""


@METHODS.register("random")
@dataclass
class RandomProcessor(ReductionProcessor):
    """Merges random tokens into random others, as many as a real method would.

    A control: whatever it reaches is owed to restoring and remembering, not to choosing. The draw depends on `seed`,
    the step and the number of tokens alone, never on the global generator.

    Attributes:
        seed: Another seed draws other tokens.
    """

    restore: str = "copy"
    match_every: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if abs(self.seed) > _LARGEST_SEED:
            raise ValueError(f"seed must be at most {_LARGEST_SEED}; got {self.seed}")

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans a draw for tokens (B, N, C), the same for every row."""
        num_tokens = tokens.shape[1]
        removed = num_removed(num_tokens, site.ratio)
        # Drawn on the CPU, also where another device is the default: the same draw everywhere.
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + frame.step)
        order = torch.randperm(num_tokens, generator=generator, device="cpu")
        leaving, staying = order[:removed], order[removed:]
        destination = torch.arange(num_tokens, device="cpu")
        destination[leaving] = staying[torch.randint(len(staying), (removed,), generator=generator, device="cpu")]
        return TokenMap.from_destinations(destination[None].to(tokens.device), num_tokens - removed)
