"""The control that keeps every token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.token_map import TokenMap


@METHODS.register("identity")
@dataclass
class IdentityProcessor(ReductionProcessor):
    """Keeps every token whatever the ratio: the output must be bit-identical to the stock model.

    A control. It goes through the same bookkeeping as every method and so shows what that costs.
    """

    keeps_all = True

    restore: str = "copy"
    text_ratio: float | None = 0.0

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans nothing for tokens (B, N, C)."""
        return TokenMap.identity(1, tokens.shape[1], tokens.device)
