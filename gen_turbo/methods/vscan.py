"""VScan: keep what is attended to early in each window and late in the whole image, and drop again in the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.method import Grid, LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import join_similar, keep_highest
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Staged

_WINDOWS = 4
"""Windows to a side of the image; the paper has 6 x 6 tokens of 24 x 24 in one."""


@METHODS.register("vscan")
@dataclass
class VScanProcessor(Staged, ReductionProcessor):
    """Keeps tokens by a local and a global scan of the vision tower, and drops again in the middle of the decoder.

    VScan (Zhang et al., TMLR 2026, arXiv 2505.22654). Section 4.1: of the tokens that reach the language model a half
    are those of most class attention in each window in an early block of the tower (local scan), the others those of
    most class attention in the last used block (global scan); every other token is averaged with the kept one that it
    is most similar to. Section 4.2: from a middle decoder layer on, the image tokens that the last token of the prompt
    attends to least are dropped.

    Costs two rows of attention in the tower, one in the decoder, and one similarity of all tokens.

    Differs from the paper: `ratio` or `keep` is the mean over decoder layers, which the paper's tables name too, and
    gives the tokens of both stages. Windows are 4 x 4 of any grid, and where they cannot share the local tokens evenly
    their second and further choices compete. Where there is no class token, the column mean of attention is taken;
    the early block is a quarter into the tower, as block 6 of 24 is.

    Attributes:
        local: Share of the tokens of the first stage that the local scan chooses.
        late: Share of the tokens of the first stage that is left in the second; the paper keeps 96 and then 32.
        cut: The decoder layer that begins the second stage, 0 for the middle one.
        semantic: Where attention in the tower comes from: "class" (or "self" where there is no class token), "self".
    """

    ratio: float = 0.66
    restore: str = "copy"
    local: float = 0.5
    late: float = 1 / 3
    cut: int = 0
    semantic: str = "class"

    needs = ("class", "self", "next")

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if self.place != "pre_llm":
            raise ValueError(f"vscan begins before the language model; place must be 'pre_llm', got {self.place!r}")
        for setting in ("local", "late"):
            if not 0 <= getattr(self, setting) <= 1:
                raise ValueError(f"{setting} must be a share of the tokens, 0 to 1; got {getattr(self, setting)}")
        if self.cut < 0:
            raise ValueError(f"cut must be a decoder layer, or 0 for the middle one; got {self.cut}")
        if self.semantic not in ("class", "self"):
            raise ValueError(f"semantic must be 'class' or 'self'; got {self.semantic!r}")

    def stages(self, num_layers: int, num_tokens: int) -> dict[int, int]:
        """How many of an image's tokens are left from which decoder layer on."""
        cut = self.cut or max(1, num_layers // 2)
        mean = num_tokens - num_removed(num_tokens, self.ratio_of(num_tokens))
        early = cut / num_layers
        first = min(num_tokens, round(mean / (early + self.late * (1 - early))))
        # Where the first stage cannot keep more than all, the second makes up for it.
        second = (mean - first * early) / (1 - early) if early < 1 else first
        return {0: max(1, first), cut: min(first, max(1, round(second)))}

    def early_block(self, num_blocks: int) -> int:
        """The block of the tower whose attention the local scan reads."""
        return max(0, num_blocks // 4 - 1)

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans one stage of tokens (B, N, C).

        Raises:
            ValueError: If the place has no attention of a tower, or of a last token.
        """
        num_tokens = tokens.shape[1]
        num_kept = num_tokens - num_removed(num_tokens, site.ratio)
        if num_kept == num_tokens:
            return TokenMap.identity(1, num_tokens, tokens.device)
        if site.name == "decoder":
            return keep_highest(self._attention(site, ("next",)), num_kept)
        kinds = dict.fromkeys((self.semantic, "self"))
        early = self._attention(site, tuple(f"early {kind}" for kind in kinds))
        late = self._attention(site, tuple(kinds))
        num_local = int(num_kept * self.local)
        locals_BK = _window_order(early, site.grid or (1, num_tokens))[:, :num_local]
        # What the local scan has chosen is not chosen again.
        globals_BK = late.scatter(1, locals_BK, -torch.inf).argsort(dim=1, descending=True, stable=True)
        kept = torch.cat([locals_BK, globals_BK[:, : num_kept - num_local]], 1).sort(dim=1).values
        features = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)).contiguous(), dim=-1)
        return join_similar(features @ features.transpose(1, 2), kept)

    @staticmethod
    def _attention(site: LayerInfo, kinds: tuple[str, ...]) -> Tensor:
        attention = site.first_semantic(*kinds)
        if attention is not None:
            return attention
        raise ValueError(
            "vscan reads the attention of a vision tower whose patches are the tokens here, and of a decoder"
        )


def _window_order(score_BN: Tensor, grid: Grid) -> Tensor:
    """Orders tokens (B, N): the best of each window, then the second of each, and so on; by score among these."""
    height, width = grid
    sides = min(_WINDOWS, height), min(_WINDOWS if height > 1 else _WINDOWS**2, width)
    row = torch.arange(height, device=score_BN.device) * sides[0] // height
    column = torch.arange(width, device=score_BN.device) * sides[1] // width
    window_BN = (row[:, None] * sides[1] + column).reshape(1, -1).expand(len(score_BN), -1)
    order = score_BN.argsort(dim=1, descending=True, stable=True)
    # Sorted by window, and by score inside each, a token's place less its window's first is its rank there.
    by_window = order.gather(1, window_BN.gather(1, order).argsort(dim=1, stable=True))
    sorted_windows = window_BN.gather(1, by_window)
    place = torch.arange(height * width, device=score_BN.device).expand_as(by_window)
    first = torch.searchsorted(sorted_windows.contiguous(), sorted_windows.contiguous())
    rank_BN = torch.empty_like(by_window).scatter(1, by_window, place - first)
    return order.gather(1, rank_BN.gather(1, order).argsort(dim=1, stable=True))
