"""A method of one's own: keep every second column of tokens.

python examples/own_method.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_turbo import TokenMap, attach, load_pipeline, report
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS


@METHODS.register("columns")
@dataclass
class ColumnsProcessor(ReductionProcessor):
    """Merges every second column of tokens into its left neighbour, whatever they show."""

    ratio: float = 0.5

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans for tokens (B, N, C); the ratio is always one half."""
        destination_N = torch.arange(tokens.shape[1], device=tokens.device) // 2 * 2
        return TokenMap.from_destinations(destination_N[None])


def main() -> None:
    """Draws one image with it and says what it reached."""
    pipe = load_pipeline("tiny", processor=None)
    with attach(pipe, ColumnsProcessor()):
        pipe("a large red circle on a gray background", num_inference_steps=4)
        print(report(pipe))


if __name__ == "__main__":
    main()
