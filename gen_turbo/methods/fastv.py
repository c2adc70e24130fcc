"""FastV: drop from a decoder layer on what the last token hardly attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import keep_highest
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placement


@METHODS.register("fastv")
@dataclass
class FastVProcessor(Placement, ReductionProcessor):
    """Drops from one decoder layer on the image tokens that the last token attends to least.

    FastV (Chen et al., ECCV 2024, arXiv 2403.06764), with the score of the released code: attention in the layer
    before, averaged over heads, of the last token of the prompt.

    Costs one row of attention. The layers before the cut run in full, so a method at the gate saves more at the same
    number of tokens. Prefers the end of the image, which is next to the question.

    Differs from the paper: the row of attention is computed on its own, so every attention kernel will do; it is
    taken in prompts with padding and of several images, each of which keeps its share.
    """

    restore: str = "copy"
    place: str = "decoder"
    combine: str = "prune"

    needs = ("last",)

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if self.place != "decoder":
            raise ValueError(
                f"fastv reads the attention of a decoder layer; place must be 'decoder', got {self.place!r}"
            )

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans for tokens (B, N, C).

        Raises:
            ValueError: If the place has no attention of a last token, as everywhere but in a decoder.
        """
        num_tokens = tokens.shape[1]
        if site.ratio == 0:
            return TokenMap.identity(1, num_tokens, tokens.device)
        score = site.first_semantic("last")
        if score is None:
            raise ValueError("fastv reads the attention of the last token, which only a decoder has; place='decoder'")
        return keep_highest(score, num_tokens - num_removed(num_tokens, site.ratio))
