"""DivPrune: keep the tokens that are most unlike each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import keep_diverse
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placement


@METHODS.register("divprune")
@dataclass
class DivPruneProcessor(Placement, ReductionProcessor):
    """Keeps image tokens that are as unlike each other as possible and drops the others.

    DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): greedy max-min diversity by cosine distance of the projected
    features. Reads neither attention nor the question, and keeps its quality at small numbers of tokens best among
    the methods here that read none.

    Costs a similarity of all tokens with all, and one step per kept token, which is slow on a device for large numbers.
    """

    ratio: float = 0.66
    restore: str = "copy"
    combine: str = "prune"

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans for tokens (B, N, C)."""
        num_tokens = tokens.shape[1]
        removed = num_removed(num_tokens, site.ratio)
        if removed == 0:
            return TokenMap.identity(1, num_tokens, tokens.device)
        return keep_diverse(tokens, num_tokens - removed)
