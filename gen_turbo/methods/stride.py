"""The trivial baseline that keeps evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.contract import Frame, Site
from gen_turbo.core.plan import ReductionPlan
from gen_turbo.core.selection import keep_spaced
from gen_turbo.hosts.vlm.settings import Placement
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS


@METHODS.register("stride")
@dataclass
class StrideProcessor(Placement, ReductionProcessor):
    """Keeps tokens at even distances and drops the others, whatever they show.

    A baseline that costs nothing. Where methods that read attention crowd their tokens in one place, it is hard to
    beat; small things between the kept tokens are lost.
    """

    restore: str = "copy"
    combine: str = "select"

    def plan(self, tokens: Tensor, site: Site, frame: Frame) -> ReductionPlan:
        """Plans for tokens (B, N, C), the same for every row."""
        num_tokens = tokens.shape[1]
        return keep_spaced(num_tokens, num_tokens - int(num_tokens * site.ratio), tokens.device)
