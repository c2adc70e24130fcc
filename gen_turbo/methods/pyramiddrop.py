"""PyramidDrop: drop from several decoder layers on, each time the same share of what is left."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import keep_highest
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Staged


@METHODS.register("pyramiddrop")
@dataclass
class PyramidDropProcessor(Staged, ReductionProcessor):
    """Drops at several decoder layers the image tokens that the last token of the prompt attends to least.

    PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247), Section 3.2: decoder layers form stages of like depth, and
    from one stage to the next a share lambda of the image tokens is left, so that shallow layers see the whole
    image. Tokens are ranked, as in the released code, by the attention that the last token of the prompt pays them
    in the first layer of the stage that begins, averaged over heads.

    Costs one row of attention per cut. The first stage runs in full: with the published four stages and a lambda of
    one half a layer sees 47 % of the image tokens on average.

    Differs from the paper: `ratio` or `keep` says how many are left in the last stage, from which lambda follows; it
    works with padding and several images in a prompt, each of which keeps its share.

    Attributes:
        cuts: The decoder layers that begin a stage, ascending, at least 1; none given makes four stages of like depth,
            as published (8, 16 and 24 of 32 layers).
    """

    ratio: float = 0.875
    restore: str = "copy"
    place: str = "decoder"
    combine: str = "prune"
    cuts: list[int] = field(default_factory=list)

    needs = ("next",)

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if self.place != "decoder":
            raise ValueError(f"pyramiddrop works in the decoder alone; place must be 'decoder', got {self.place!r}")
        if sorted(set(self.cuts)) != list(self.cuts) or any(cut < 1 for cut in self.cuts):
            raise ValueError(f"cuts must be decoder layers from 1 on, ascending; got {self.cuts}")

    def stages(self, num_layers: int, num_tokens: int) -> dict[int, int]:
        """How many of an image's tokens are left from which decoder layer on."""
        cuts = self.cuts or sorted({max(1, num_layers * stage // 4) for stage in (1, 2, 3)})
        left = num_tokens - num_removed(num_tokens, self.ratio_of(num_tokens))
        share = left / num_tokens
        kept = {cut: max(left, round(num_tokens * share ** (stage / len(cuts)))) for stage, cut in enumerate(cuts, 1)}
        return {0: num_tokens} | kept

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans one cut of tokens (B, N, C).

        Raises:
            ValueError: If the place has no attention of a last token, as everywhere but in a decoder.
        """
        num_tokens = tokens.shape[1]
        removed = num_removed(num_tokens, site.ratio)
        if removed == 0:
            return TokenMap.identity(1, num_tokens, tokens.device)
        score = site.first_semantic("next")
        if score is None:
            raise ValueError("pyramiddrop reads the attention of the last token, which only a decoder has")
        return keep_highest(score, num_tokens - removed)
