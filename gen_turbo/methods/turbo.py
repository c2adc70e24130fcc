"""Turbo: merge the tokens of least information degree."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from gen_turbo.method import Grid, LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.match import bipartite_soft_matching, line_soft_matching, tile_soft_matching
from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.ratios import max_ratio, num_removed
from gen_turbo.tokens.score import information_penalty
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.tokens.video import video_soft_matching

_STRIDE = (2, 2)
_LEAST_TILE, _TILES_A_SIDE = 4, 4


@METHODS.register("turbo")
@dataclass
class TurboProcessor(ReductionProcessor):
    """Merges the tokens that are most redundant and carry the least meaning.

    Turbo (Ju et al., ECCV 2024, arXiv 2407.11717): the information degree of a token falls with its mutual
    redundancy `R`, the cosine similarity to its most similar destination, and rises with its semantic value `A`,
    the attention that it receives. Tokens leave in the order of `R - value_weight * N * A`.

    Costs one tile-local similarity per plan. Merging costs more than it saves below about 1,000 tokens.

    Differs from the paper: destinations are one token per 2 x 2 cell, similarities are taken inside tiles with
    one budget for the whole image, and by default the merged layer's missing detail is remembered and added back.

    The defaults were chosen on the embedded model by distance to stock. With remembered detail a ratio of 0.7 costs
    hardly more fidelity than 0.5 and, unlike 0.75, fits grids with odd sides. Tiles beat matching over the whole
    image. A larger `value_weight` moves copied images away from stock, and makes no difference to corrected ones.

    Attributes:
        semantic: Where the semantic value comes from: "self" is the column mean of self-attention; "text" is the
            share of a token's cross-attention that goes to words of the prompt, asked of the block that plans;
            "none" is redundancy alone. "text" raises ValueError in the first planning step of a model that shows no
            text. A plan without a model, as by `plan_tokens`, knows neither and takes redundancy alone, as whole
            blocks of denoisers do; scope "auto" takes no block where this or `value_weight` was changed.
        value_weight: Weight of the semantic value whose mean is 1. Raising it protects attended tokens more.
        tile: Side of the tiles that are matched, in tokens; 0 matches over the whole image. A small image has
            smaller ones, four to its shorter side but of no less than 4 tokens, lest distant places are merged.
    """

    map_period = 2
    attention_settings = ("semantic", "value_weight")

    ratio: float = 0.7
    scope: str = "auto"
    restore: str = "auto"
    semantic: str = "self"
    value_weight: float = 0.002
    tile: int = 8

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if self.semantic not in ("self", "text", "none"):
            raise ValueError(f"semantic must be 'self', 'text' or 'none'; got {self.semantic!r}")
        if self.value_weight < 0:
            raise ValueError(f"value_weight must not be negative; got {self.value_weight}")
        if self.tile != 0 and self.tile < 2:
            raise ValueError(f"tile must be 0 (whole image) or at least 2 tokens; got {self.tile}")

    def unread(self, place: str, has_grid: bool) -> dict[str, str]:
        """The settings that nothing reads at a place of a vision-language model, and where they belong."""
        found = {}
        if not has_grid or place == "tower":
            found["tile"] = "image tokens on a grid"
        if self.semantic == "text":
            found["semantic"] = "denoisers, where it reads cross-attention"
        if self.semantic == "none" or place in ("decoder", "projector"):
            found["value_weight"] = "a semantic value, as place='tower' and place='pre_llm' have"
        return found

    @property
    def max_ratio(self) -> float:
        """Three of the four tokens of a cell can leave."""
        return max_ratio(_STRIDE)

    def max_ratio_at(self, site: LayerInfo) -> float:
        """In a video that is planned as a whole only the first frame needs its destinations."""
        if site.num_frames == 1 or site.grid is None:
            return self.max_ratio
        num_first = prod(-(-side // step) for side, step in zip(site.grid, _STRIDE, strict=True))
        return 1 - num_first / (site.num_frames * prod(site.grid))

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans the merge of tokens (B, N, C); a grid that is too small for the ratio raises ValueError."""
        penalty_BN = self._penalty(site)
        if site.num_frames > 1 and site.grid is not None:
            count, tile = num_removed(tokens.shape[1], site.ratio), self._tile(site.grid) or max(site.grid)
            return video_soft_matching(tokens, site.num_frames, site.grid, count, tile, _STRIDE, penalty_BN)
        count = num_removed(tokens.shape[1], site.ratio, _STRIDE)
        if site.grid is None:
            return line_soft_matching(tokens, count, penalty_BN=penalty_BN)
        if self.tile == 0:
            destinations = grid_destinations(site.grid, _STRIDE).to(tokens.device)
            return bipartite_soft_matching(tokens, destinations, count, penalty_BN)
        is_shifted = frame.num_plans % 2 == 1
        return tile_soft_matching(
            tokens,
            site.grid,
            count,
            tile=self._tile(site.grid),
            stride=_STRIDE,
            shift=is_shifted,
            penalty_BN=penalty_BN,
        )

    def _tile(self, grid: Grid) -> int:
        """The side of the tiles on a (height, width) grid, even as the cells are."""
        quarter = min(grid) // _TILES_A_SIDE // 2 * 2
        return min(self.tile, max(_LEAST_TILE, quarter))

    def _penalty(self, site: LayerInfo) -> Tensor | None:
        if self.semantic == "none" or self.value_weight == 0 or site.semantic is None:
            return None
        value_BN = site.semantic(self.semantic)
        if value_BN is None and self.semantic == "text":
            raise ValueError(
                f"semantic='text' found no text at {site.name}: the layer has no cross-attention beside it or the call "
                "brings no text; use semantic='self' or 'none'"
            )
        return None if value_BN is None else information_penalty(value_BN, self.value_weight)
