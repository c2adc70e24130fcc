"""E-AdaPrune: keep as many tokens of an image as its features have directions, and those that are most unlike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_turbo.methods.divprune import DivPruneProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed


@METHODS.register("eadaprune")
@dataclass
class EAdaPruneProcessor(DivPruneProcessor):
    """Gives each image a budget of its own, by the spectrum of its features, and keeps its most diverse tokens.

    E-AdaPrune (He and Chen, 2026, arXiv 2603.05950): an image keeps k tokens, the least number of singular values of
    its projected features that hold a share of their energy, `sum_(i<=k) s_i^2 >= energy * sum_i s_i^2`. Images full
    of detail keep more, plain ones fewer; what images keep on average is set by `energy`, and known by measuring.

    Costs the eigenvalues of one matrix of (channels x channels) or (tokens x tokens) for each image, whichever is
    smaller, a wait for the device, and the choice of tokens.

    Differs from the paper: eigenvalues are exact, where it estimates singular values at random. Other methods may
    choose the tokens there; here it is DivPrune. Written from the paper's abstract and introduction alone.

    Attributes:
        ratio: The most that may leave, as a fraction of an image's tokens; `keep` says the same as the least number
            that stays. 0 is the model as it is.
        energy: The share of energy, above 0 and at most 1. Raising it keeps more tokens.
    """

    ratio: float = 0.95
    energy: float = 0.9

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be a share, 0 < energy <= 1; got {self.energy}")
        if self.place not in ("pre_llm", "decoder"):
            raise ValueError(
                f"eadaprune works on image tokens of a prompt; place must be 'pre_llm', got {self.place!r}"
            )

    def unread(self, place: str, has_grid: bool) -> dict[str, str]:
        """The settings that nothing reads, and where they belong."""
        return {"adaptive": "methods whose images all have one budget"}

    @torch.no_grad()
    def budgets(self, tokens_KNC: Tensor) -> list[int]:
        """How many tokens each image of (K, N, C) keeps."""
        num_images, num_tokens, width = tokens_KNC.shape
        least = num_tokens - num_removed(num_tokens, self.ratio_of(num_tokens))
        if least == num_tokens:
            return [num_tokens] * num_images
        # Shares of energy near one need every digit; MPS has no more of them. What is no number has no energy.
        x = tokens_KNC.to(torch.float32 if tokens_KNC.device.type == "mps" else torch.float64)
        x = x.nan_to_num(0.0, 0.0, 0.0)
        gram = x.transpose(1, 2) @ x if width < num_tokens else x @ x.transpose(1, 2)
        energy = torch.linalg.eigvalsh(gram).flip(1).clamp_min(0).cumsum(1)
        kept = (energy < self.energy * energy[:, -1:]).sum(1) + 1
        return [int(number) for number in kept.clamp(least, num_tokens).tolist()]
