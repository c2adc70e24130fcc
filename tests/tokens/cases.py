"""Cases for the pure functions: thin grids, broken numbers, ties, half types and any memory layout.

2,000 cases, always the same; GEN_TURBO_FUZZ=100000 runs as many of them.
"""

from __future__ import annotations

import math
import os
import random
from typing import NamedTuple

import oracles
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from gen_turbo.tokens.token_map import TokenMap

_NUM_TESTS = 11
CASES = settings(
    max_examples=-(-int(os.environ.get("GEN_TURBO_FUZZ", "2000")) // _NUM_TESTS),
    deadline=None,
    derandomize=True,
    database=None,
    # Cases are small already.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
GRID = st.one_of(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 30)),
    st.tuples(st.integers(1, 30), st.integers(1, 3)),
)
RANDOM = st.integers(0, 2**32 - 1).map(random.Random)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BROKEN = [math.nan, math.inf, -math.inf]


class Tokens(NamedTuple):
    """Tokens (B, N, C), and the same as lists of floats."""

    x: Tensor
    rows: list[list[list[float]]]


def exact(rng: random.Random) -> list[float]:
    """A token whose length and cosines every type holds exactly, so that ties are ties."""
    scale = rng.choice([1.0, 2.0, 0.5])
    if rng.random() < 0.5:
        return [
            scale * (channel == place) * sign
            for place, sign in [(rng.randrange(4), rng.choice([1, -1]))]
            for channel in range(4)
        ]
    return [scale * rng.choice([1, -1]) for _ in range(4)]


def laid_out(x: Tensor, rng: random.Random) -> Tensor:
    """The same numbers in memory of another order or with gaps."""
    kind = rng.randrange(4)
    if kind == 0:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 1:
        return torch.cat([x, x], 2)[..., : x.shape[2]]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if kind == 2 else x


def tokens(rng: random.Random, num_tokens: int, batch: int = 2, is_tied: bool | None = None) -> Tokens:
    """Tokens in general position in float64, or tied ones in any type; some all zero, some broken."""
    tied = rng.random() < 0.5 if is_tied is None else is_tied
    rows = [
        [exact(rng) if tied else [rng.gauss(0, 1) for _ in range(4)] for _ in range(num_tokens)] for _ in range(batch)
    ]
    for row in rows:
        for _ in range(rng.choice([0, 0, 1, 3, num_tokens])):
            row[rng.randrange(num_tokens)] = [0.0] * 4
        for _ in range(rng.choice([0, 0, 1, 3, num_tokens])):
            row[rng.randrange(num_tokens)][rng.randrange(4)] = rng.choice(BROKEN)
    x = torch.tensor(rows, dtype=torch.float64)
    return Tokens(laid_out(x.to(rng.choice(DTYPES)) if tied else x, rng), rows)


def penalties(rng: random.Random, num_tokens: int) -> list[float]:
    """A penalty of each token, some infinite or no number; the others exact."""
    return [
        rng.choice([*BROKEN, 9.0]) if rng.random() < 0.1 else rng.choice([0.0, 0.25, 0.5, 1.0])
        for _ in range(num_tokens)
    ]


def destinations(plan: TokenMap) -> list[list[int]]:
    """The token whose place each token takes; asserts that the plan is one."""
    batch, num_slots = plan.anchor_BM.shape
    assert torch.equal(plan.slot_BN.gather(1, plan.anchor_BM), torch.arange(num_slots).expand(batch, -1))
    assert (plan.anchor_BM.diff(dim=1) > 0).all()
    return plan.anchor_BM.gather(1, plan.slot_BN).tolist()


def matched(rng: random.Random, given: Tokens, candidates: dict[int, list[int]], plan) -> None:
    """Asserts that `plan(x, count, penalty)` is the loop's, with a penalty and without."""
    num_tokens, num_able = given.x.shape[1], sum(bool(near) for near in candidates.values())
    penalty = penalties(rng, num_tokens)
    num_penalised = sum(bool(near) and penalty[source] != math.inf for source, near in candidates.items())
    for values, able in ((None, num_able), (penalty, num_penalised)):
        count = rng.randint(0, able)
        found = destinations(plan(given.x, count, None if values is None else torch.tensor([values])))
        for row, own in zip(given.rows, found, strict=True):
            assert own == oracles.match(row, candidates, count, values or [0.0] * num_tokens)
