"""The trivial baseline that averages cells of the grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.contract import Frame, Site
from gen_turbo.core.plan import ReductionPlan
from gen_turbo.core.selection import pool_cells
from gen_turbo.hosts.vlm.settings import Placement
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS


@METHODS.register("pool")
@dataclass
class PoolProcessor(Placement, ReductionProcessor):
    """Averages rectangular cells of the picture, as a smaller picture would.

    A baseline that costs next to nothing, at any number of tokens: cells are as equal as whole numbers allow. Strong
    where the whole picture matters, weak on small things. Without a grid it averages runs of the line of tokens.
    """

    restore: str = "copy"

    def plan(self, tokens: Tensor, site: Site, frame: Frame) -> ReductionPlan:
        """Plans for tokens (B, N, C), the same for every row."""
        num_tokens = tokens.shape[1]
        return pool_cells(site.grid or (1, num_tokens), num_tokens - int(num_tokens * site.ratio), tokens.device)
