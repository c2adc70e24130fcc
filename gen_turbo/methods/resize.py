"""The trivial baseline that shows the model a smaller image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import shrink_cells, shrunk_grid
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placement


@METHODS.register("resize")
@dataclass
class ResizeProcessor(Placement, ReductionProcessor):
    """Makes images smaller before the vision tower reads them.

    The baseline that every selection of tokens has to beat: the tower gets cheaper too. Images keep their shape as
    well as whole patches allow, so at most the wanted number of tokens stays, often a few less. Weak on small things.

    The tower's position embeddings are interpolated by the model's own code; a tower that does not offer it is
    refused, as are models that cut images into tiles. Models of dynamic resolution need no method: give their
    preparer a smaller `max_pixels`.
    """

    ratio: float = 0.5
    restore: str = "copy"
    place: str = "input"

    needs = ("input",)

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if self.place != "input":
            raise ValueError(f"resize makes images smaller; place must be 'input', got {self.place!r}")

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans for tokens (B, N, C) of a grid, the same for every row.

        Raises:
            ValueError: If there is no image to make smaller, as everywhere but before a vision tower.
        """
        num_tokens = tokens.shape[1]
        if site.ratio == 0:
            return TokenMap.identity(1, num_tokens, tokens.device)
        if site.name != "input" or site.grid is None:
            raise ValueError("resize makes a vision-language model's images smaller, which are not here; use pool")
        smaller = shrunk_grid(site.grid, num_tokens - num_removed(num_tokens, site.ratio))
        return shrink_cells(site.grid, smaller, tokens.device)
