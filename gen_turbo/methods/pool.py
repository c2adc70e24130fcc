"""The trivial baseline that averages cells of the grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import pool_cells
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placement


@METHODS.register("pool")
@dataclass
class PoolProcessor(Placement, ReductionProcessor):
    """Averages rectangular cells of the image, as a smaller image would.

    A baseline that costs next to nothing, at any number of tokens: cells are as equal as whole numbers allow. Strong
    where the whole image matters, weak on small things. Without a grid it averages runs of the line of tokens.
    """

    restore: str = "copy"

    plans_videos = False

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans for tokens (B, N, C), the same for every row."""
        num_tokens = tokens.shape[1]
        return pool_cells(site.grid or (1, num_tokens), num_tokens - num_removed(num_tokens, site.ratio), tokens.device)
