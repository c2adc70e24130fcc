"""What the loops of these tests are given: tokens, semantic values, and what a method plans."""

from __future__ import annotations

import math

import torch

from gen_turbo.method import LayerInfo, StepInfo

RATIOS = [0.1, 0.5, 0.8, 0.999]
FIRST = StepInfo()


class Values:
    """Semantic values by kind, which remembers what was asked for."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self.asked: list[str] = []

    def __call__(self, kind: str) -> torch.Tensor | None:
        self.asked.append(kind)
        return self.values.get(kind)


def tokens(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Random tokens (2, N, 6) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num_tokens, 6, dtype=torch.float64, generator=generator)


def value(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Values (2, N) of one digit, so that some are equal."""
    generator = torch.Generator().manual_seed(100 + seed)
    return (torch.rand(2, num_tokens, generator=generator) * 10).round() / 10


def planned(processor, x, semantic=None, grid=None, name="pre_llm", frame=FIRST) -> list[list[int]]:
    """The token whose place each token takes."""
    plan = processor.plan(x, LayerInfo(name, processor.ratio, grid, semantic=semantic), frame)
    assert plan.num_tokens == x.shape[1] and bool((plan.anchor_BM.diff() > 0).all())
    return plan.anchor_BM.gather(1, plan.slot_BN).tolist()


def ranked(score: list[float], others: list[int] | None = None) -> list[int]:
    """Tokens by falling score, equal ones in token order."""
    return sorted(range(len(score)) if others is None else others, key=lambda token: (-score[token], token))


def left(num_tokens: int, ratio: float) -> int:
    """How many tokens stay."""
    return max(1, num_tokens - math.floor(num_tokens * ratio + 1e-9))


def join_nearest(kept: list[int], num_tokens: int) -> list[int]:
    """Each token's own place if it is kept, else that of the kept one nearest in token order, of two the later."""
    return [min(kept, key=lambda other, n=n: (abs(other - n), -other)) for n in range(num_tokens)]
