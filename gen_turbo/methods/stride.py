"""The trivial baseline that keeps evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import keep_spaced
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placement


@METHODS.register("stride")
@dataclass
class StrideProcessor(Placement, ReductionProcessor):
    """Keeps tokens at even distances and drops the others, whatever they show.

    A baseline that costs nothing. Where methods that read attention crowd their tokens in one place, it is hard to
    beat; small things between the kept tokens are lost.
    """

    restore: str = "copy"
    combine: str = "prune"

    plans_videos = False

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans for tokens (B, N, C), the same for every row."""
        num_tokens = tokens.shape[1]
        return keep_spaced(num_tokens, num_tokens - num_removed(num_tokens, site.ratio), tokens.device)
