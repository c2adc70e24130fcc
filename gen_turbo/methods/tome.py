"""ToMe for Stable Diffusion: the published baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.match import bipartite_soft_matching, line_soft_matching
from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.ratios import max_ratio, num_removed
from gen_turbo.tokens.token_map import TokenMap

_STRIDE = (2, 2)


@METHODS.register("tome")
@dataclass
class ToMeProcessor(ReductionProcessor):
    """Merges the tokens that are most similar to another, over the whole image, afresh in every step.

    Token Merging for Fast Stable Diffusion (Bolya and Hoffman, 2023, arXiv 2303.17604): one destination per 2 x 2
    cell, similarity of every other token to every destination, the most similar pairs merge, outputs are copied.

    Use it to compare; matching over all pairs costs about a tenth of the attention that it saves.

    Differs from the paper: it matches what attention reads, after the norm; a cell's destination is drawn from a
    hash of the seed and the number of plans made, so the same seed gives the same image.

    Attributes:
        is_hashed: Whether cells draw their destination; otherwise it is the top left token.
        seed: Another seed draws other destinations.
    """

    restore: str = "copy"
    match_every: int | None = 1
    is_hashed: bool = True
    seed: int = 0

    plans_videos = False

    @property
    def max_ratio(self) -> float:
        """Three of the four tokens of a cell can leave."""
        return max_ratio(_STRIDE)

    def unread(self, place: str, has_grid: bool) -> dict[str, str]:
        """The settings that nothing reads at a place of a vision-language model, and where they belong."""
        found = {} if has_grid else dict.fromkeys(("is_hashed", "seed"), "image tokens on a grid")
        return found if self.is_hashed else found | {"seed": "is_hashed=True"}

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans the merge of tokens (B, N, C)."""
        count = num_removed(tokens.shape[1], site.ratio, _STRIDE)
        if site.grid is None:
            return line_soft_matching(tokens, count)
        variant = self.seed * 1_000_003 + frame.num_plans if self.is_hashed else "corner"
        destinations = grid_destinations(site.grid, _STRIDE, variant).to(tokens.device)
        return bipartite_soft_matching(tokens, destinations, count)
