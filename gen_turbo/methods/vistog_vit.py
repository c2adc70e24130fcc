"""VisToG in a vision encoder: semantic tokens gather similar patches before the language model reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import pool_cells
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Grouped


@METHODS.register("vistog_vit")
@dataclass
class VisToGVisionProcessor(Grouped, ReductionProcessor):
    """Groups the patches of a vision encoder around semantic tokens; the language model reads groups alone.

    VisToG (arXiv 2411.17773): semantic tokens pass through the frozen encoder under isolated attention, so that the
    patches stay what they were; a grouping layer then gives each patch to one of them. Training
    (`gen-turbo calibrate vistog`) distils the model that reads every patch and needs no labels. Without `weights`
    groups are the cells of the grid, averaged: what pooling before the projector gives.

    Costs the encoder the share of its arithmetic that the semantic tokens add to the patches, less by `first_block`.

    Differs from the paper: semantic tokens begin as the means of cells plus what is learned, and near patches are
    preferred. Where it works outside a vision encoder, such as in a denoiser, it pools cells of the grid.
    """

    ratio: float = 0.75
    restore: str = "copy"

    def unread(self, place: str, has_grid: bool) -> dict[str, str]:
        """The settings that nothing reads, and where they belong."""
        if not self.removes:
            return {}
        if self.weights is not None:
            return dict.fromkeys(("ratio", "keep", "first_block"), "weights=None, for weights bring their own")
        return dict.fromkeys(("ratio", "keep"), "num_tokens=0") if self.num_tokens else {}

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans cells for tokens (B, N, C), the same for every row."""
        num_tokens = tokens.shape[1]
        return pool_cells(site.grid or (1, num_tokens), num_tokens - num_removed(num_tokens, site.ratio), tokens.device)
