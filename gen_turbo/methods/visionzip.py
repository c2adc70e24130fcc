"""VisionZip: keep what the class token attends to, merge the rest into a few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placement


@METHODS.register("visionzip")
@dataclass
class VisionZipProcessor(Placement, ReductionProcessor):
    """Keeps the tokens of most attention and merges the others into evenly spaced ones.

    VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): dominant tokens are those that the class token attends to
    most in the last used block of the tower (the column mean of attention where there is no class token). Of the
    rest, evenly spaced ones are targets, and every other joins the most similar target.

    Costs one row of attention and one similarity. Needs a tower whose patches are the tokens of the prompt.

    Differs from the paper: similarity is that of projected features, not of keys; a target and those that join it
    are averaged alike.

    Attributes:
        contextual: Fraction of the kept tokens that are merged ones; the paper keeps 54 dominant and 10 merged of 64.
        semantic: Where attention comes from: "class" (or "self" where there is no class token), "self".
    """

    ratio: float = 0.66
    restore: str = "copy"
    contextual: float = 10 / 64
    semantic: str = "class"

    needs = ("class", "self")

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"contextual must be a fraction of the kept tokens, 0 to 1; got {self.contextual}")
        if self.semantic not in ("class", "self"):
            raise ValueError(f"semantic must be 'class' or 'self'; got {self.semantic!r}")

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans for tokens (B, N, C).

        Raises:
            ValueError: If the place has no attention of a tower.
        """
        batch, num_tokens, _ = tokens.shape
        num_kept = num_tokens - num_removed(num_tokens, site.ratio)
        if num_kept == num_tokens:
            return TokenMap.identity(1, num_tokens, tokens.device)
        attention = self._attention(site)
        num_merged = max(1, round(num_kept * self.contextual)) if self.contextual else 0
        num_merged = min(num_merged, num_kept)
        order = attention.argsort(dim=1, descending=True, stable=True)
        rest = order[:, num_kept - num_merged :].sort(dim=1).values
        step = torch.arange(num_merged, device=tokens.device) * rest.shape[1] // num_merged
        # Without targets every other token joins the most attended one.
        targets = rest[:, step] if num_merged else order[:, :1]
        features = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)).contiguous(), dim=-1)
        similarity = features @ _take(features, targets).transpose(1, 2)
        destination = targets.gather(1, similarity.argmax(2))
        own = torch.arange(num_tokens, device=tokens.device).expand(batch, -1)
        stays = torch.cat([order[:, : num_kept - num_merged], targets], 1)
        return TokenMap.from_destinations(destination.scatter(1, stays, own.gather(1, stays)), num_kept)

    def _attention(self, site: LayerInfo) -> Tensor:
        attention = site.first_semantic(self.semantic, "self")
        if attention is not None:
            return attention
        raise ValueError(
            "visionzip reads the attention of a vision tower whose patches are the tokens here; there is none"
        )


def _take(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    return x_BNC.gather(1, index_BK[..., None].expand(-1, -1, x_BNC.shape[-1]))
