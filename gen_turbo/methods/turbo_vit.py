"""Turbo as published for vision encoders: merge in every block what is redundant and means little."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.alternating import alternating_soft_matching
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.score import information_penalty
from gen_turbo.tokens.select import keep_diverse
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.merging import Merging
from gen_turbo.vlm.settings import Placement


@METHODS.register("turbo_vit")
@dataclass
class TurboVisionProcessor(Placement, ReductionProcessor):
    """Merges image tokens of least information degree between self-attention and MLP of every vision block.

    Turbo (Ju et al., ECCV 2024, arXiv 2407.11717), the form of the released code: tokens are split alternately into
    sources and destinations, `R_ij` is the cosine of their keys averaged over heads, and the sources of highest
    `E_ij = R_ij - c * alpha * beta ** |gamma - l| * A_i` merge, each into its most similar destination. `A` is the
    attention that the class token pays, or where there is none the column mean of attention; `l` is the block.

    Costs one similarity of half the tokens with the other half per block. Where later code needs every patch the
    tower's output is restored and the copies are dropped before the language model.

    Differs from the paper: tokens keep their raster order, so after the first block the alternation falls otherwise.
    By default the weight of `A` does not depend on the number of tokens. Where more than half of the tokens are to
    leave at once, which one merge cannot reach, `beyond_half` says how they do.

    Attributes:
        num_removed: Tokens that leave in each block, `r` of the paper; 0 spreads `ratio` over the blocks evenly.
        semantic: Where `A` comes from: "class", "self" (also used by "class" where there is no class token), "none".
            The class token shows what matters where it was trained to. Where nothing reads it, as in the embedded
            model, "self" with a `value_weight` of 0.05 keeps far more of the answers.
        value_weight: Weight of `N * A` where `alpha` is None. Raising it protects attended tokens more.
        alpha: The paper's weight of `A`; None uses `value_weight`.
        scale: The paper's constant `c`: 30 in BLIP, 100 in language models that read the image.
        beta: Base of the block's weight; 1 weighs all blocks alike.
        gamma: The block of greatest weight.
        threshold: A block with fewer tokens, class token included, merges none.
        num_merges: In a tower, how many blocks merge, evenly spaced, where `ratio` or `keep` says how much goes in
            all; 0 is every block, as published. Raising it costs operators, which small batches wait for.
        beyond_half: Where more than half of the tokens are to leave at once: "repeat" merges again until they have;
            "diverse" keeps those that are as unlike each other as can be, DivPrune's choice, and merges every other
            into the most similar one. In a tower so many leave only in the last block that merges and only where few
            stay, 28 of 256 in four blocks; there "diverse" keeps small things that repeated merging loses. It takes
            one step per token that stays, which a batch does not lengthen.
    """

    ratio: float = 0.66
    restore: str = "copy"
    place: str = "tower"
    num_removed: int = 0
    semantic: str = "class"
    value_weight: float = 0.26
    alpha: float | None = None
    scale: float = 30.0
    beta: float = 1.0
    gamma: int = 0
    threshold: int = 0
    num_merges: int = 8
    beyond_half: str = "repeat"

    plans_videos = False
    plans_leading = True
    vlm_settings = ("num_merges",)
    attention_settings = ("semantic", "value_weight", "alpha", "scale", "beta", "gamma")

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if self.semantic not in ("class", "self", "none"):
            raise ValueError(f"semantic must be 'class', 'self' or 'none'; got {self.semantic!r}")
        if self.beyond_half not in ("repeat", "diverse"):
            raise ValueError(f"beyond_half must be 'repeat' or 'diverse'; got {self.beyond_half!r}")
        for setting in ("num_removed", "value_weight", "scale", "beta", "threshold", "num_merges"):
            if getattr(self, setting) < 0:
                raise ValueError(f"{setting} must not be negative; got {getattr(self, setting)}")

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans the merge of tokens (B, N, C): the mean keys of a block, or features before the language model."""
        batch, leading = len(tokens), site.num_leading
        num_tokens = tokens.shape[1] - leading
        in_tower = self.num_removed > 0 and site.name != "text"
        left = min(self.num_removed, num_tokens // 2) if in_tower else num_removed(num_tokens, site.ratio)
        if not left or (in_tower and not self.removes) or num_tokens + 1 < self.threshold:
            return TokenMap.identity(batch, num_tokens + leading, tokens.device)
        if self.beyond_half == "diverse" and left > num_tokens // 2:
            return keep_diverse(tokens[:, leading:], num_tokens - left).between(leading, 0)
        value, total = self._value(site), None
        while left:
            now = min(left, (tokens.shape[1] - leading) // 2)
            penalty = None if value is None else self._penalty(value[:, leading:], frame.num_plans)
            plan = alternating_soft_matching(tokens, now, penalty, leading)
            left -= now
            if not left:
                return plan if total is None else total.plan().then(plan)
            merging = Merging.of(plan, batch, 0, None if total is None else total.sizes)
            total = merging if total is None else total.then(merging)
            both = merging.merge(tokens if value is None else torch.cat([tokens.to(value.dtype), value[..., None]], -1))
            tokens, value = (both, None) if value is None else (both[..., :-1], both[..., -1])
        raise AssertionError("nothing is left to remove")

    def unread(self, place: str, has_grid: bool) -> dict[str, str]:
        """The settings that nothing reads at a place, and where they belong."""
        found: dict[str, str] = {}
        if place != "tower":
            found |= dict.fromkeys(("num_removed", "num_merges"), "place='tower'")
        elif self.num_removed:
            found |= dict.fromkeys(("num_merges", "ratio", "keep", "beyond_half"), "num_removed=0")
        if self.keep is None and max(self.ratio, self.text_ratio or 0.0) <= 0.5:
            found["beyond_half"] = "ratio above 0.5"
        if self.alpha is None or self.semantic == "none":
            found |= dict.fromkeys(("scale", "beta", "gamma"), "alpha with a semantic value")
        if self.semantic == "none":
            found |= dict.fromkeys(("alpha", "value_weight"), "a semantic value")
        elif self.alpha is not None:
            found["value_weight"] = "alpha=None"
        if place in ("decoder", "projector") and self.semantic != "none":
            found |= dict.fromkeys(("semantic", "alpha", "value_weight"), "place='tower' and place='pre_llm'")
        return found

    def _value(self, site: LayerInfo) -> Tensor | None:
        if self.semantic == "none" or site.semantic is None:
            return None
        value = site.semantic(self.semantic)
        return site.semantic("self") if value is None and self.semantic == "class" else value

    def _penalty(self, value_BN: Tensor, block: int) -> Tensor:
        if self.alpha is None:
            return information_penalty(value_BN, self.value_weight)
        return self.scale * self.alpha * self.beta ** abs(self.gamma - block) * value_BN
