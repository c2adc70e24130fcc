"""VisToG without training: visual token grouping for denoisers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.group import group_tokens
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap

_WIDEST, _MOST_REFINEMENTS = 31, 100
"""Memory grows with the square of the window, and time with the refinements."""


@METHODS.register("vistog")
@dataclass
class VisToGProcessor(ReductionProcessor):
    """Groups similar tokens that lie near each other, every token in exactly one group.

    After visual token grouping (VisToG, arXiv 2411.17773): hard assignment of each token to the most similar of the
    groups. Attention then runs among groups, and each token takes its group's result, or its change, back. Reaches
    any ratio below 1 on any grid; without a grid, groups are made along the line of tokens.

    Costs one similarity of each token with the groups around its tile, and as much again per refinement, in memory
    linear in the number of tokens.

    Differs from the paper: no semantic tokens are trained and none pass through the model. Groups begin as tokens of
    the grid, similarity is the cosine of what attention reads, and only groups within a window can be joined.

    The defaults were chosen by the distance of copied-back groups to the tokens, in one layer of the embedded model
    and one image: a window of 5 loses 8 to 9 % less than one of 3, and a second refinement at most 1 % less.

    Attributes:
        window: Side of the window in groups; odd. Raising it finds better matches for noisy tokens and costs more.
        num_refinements: How often groups move to the mean of their members and tokens choose again.
        free: Share of the groups kept for single tokens that are least like the others; the rest cover the grid.
            Raising it spares detail and coarsens what is smooth.
    """

    map_period = 1

    ratio: float = 0.7
    window: int = 5
    num_refinements: int = 1
    free: float = 0.25

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window must be an odd number of groups such as 3 or 5; got {self.window}")
        if self.window > _WIDEST:
            raise ValueError(f"window must be at most {_WIDEST} groups; got {self.window}")
        if not 0 <= self.num_refinements <= _MOST_REFINEMENTS:
            raise ValueError(f"num_refinements must be 0 to {_MOST_REFINEMENTS}; got {self.num_refinements}")
        if not 0 <= self.free < 1:
            raise ValueError(f"free must be a share of the groups, 0 <= free < 1; got {self.free}")

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans the groups of tokens (B, N, C)."""
        num_tokens = tokens.shape[1]
        num_groups = num_tokens - num_removed(num_tokens, site.ratio)
        num_free = num_removed(num_groups, self.free)
        return group_tokens(
            tokens, site.grid or (1, num_tokens), num_groups, self.window, self.num_refinements, num_free
        )
