"""What token maps do with tokens, against plain loops; the cases are those of `tests/tokens/cases.py`."""

from __future__ import annotations

import math
import random

import oracles
import torch
from hypothesis import given
from hypothesis import strategies as st

from gen_turbo.tokens.frames import one_sequence
from gen_turbo.tokens.score import attention_column_mean, mean_one, text_attention
from gen_turbo.tokens.token_map import TokenMap
from tests.tokens.cases import (
    BROKEN,
    CASES,
    DTYPES,
    RANDOM,
    destinations,
    laid_out,
)


def random_plan(rng: random.Random, batch: int, num_tokens: int) -> TokenMap:
    """A plan whose rows differ."""
    num_slots, rows = rng.randint(1, num_tokens), []
    for _ in range(batch):
        stays = rng.sample(range(num_tokens), num_slots)
        rows.append([n if n in stays else rng.choice(stays) for n in range(num_tokens)])
    return TokenMap.from_destinations(torch.tensor(rows))


def mean(values: list[float], weights: list[float]) -> float:
    """The weighted mean of floats; not a number as IEEE has it."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


@CASES
@given(st.integers(1, 24), st.integers(1, 3), st.integers(1, 3), RANDOM)
def test_verbs(num_tokens: int, batch: int, repeats: int, rng: random.Random) -> None:
    """Catches broken numbers that reach another slot or row, sums in half types, and offsets of the wrong row."""
    plan, dtype = random_plan(rng, batch, num_tokens), rng.choice(DTYPES)
    rows = [
        [rng.choice([float(rng.randint(-9, 9)), *BROKEN[: rng.random() < 0.2]]) for _ in range(num_tokens)]
        for _ in range(batch * repeats)
    ]
    x = laid_out(torch.tensor(rows, dtype=dtype)[..., None], rng)
    weights = [[float(rng.randint(1, 5)) for _ in range(num_tokens)] for _ in range(batch * repeats)]
    shares = rng.random() < 0.5
    weight = torch.tensor(weights[:batch] if shares else weights, dtype=rng.choice(DTYPES))
    slots, anchors = plan.slot_BN.tolist(), plan.anchor_BM.tolist()
    # Sums of whole numbers are exact and a quotient is rounded, twice in half types.
    tolerance = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 3 * torch.finfo(dtype).eps, "equal_nan": True}
    for is_weighted in (False, True):
        merged = plan.merge(x, weight if is_weighted else None)
        assert merged.dtype == dtype
        for b, row in enumerate(rows):
            factors = weights[b % batch if shares else b] if is_weighted else [1.0] * num_tokens
            wanted = []
            for slot in range(plan.num_slots):
                own = [n for n in range(num_tokens) if slots[b % batch][n] == slot]
                wanted.append(mean([row[n] for n in own], [factors[n] for n in own]))
            torch.testing.assert_close(merged[b, :, 0].double(), torch.tensor(wanted, dtype=torch.float64), **tolerance)
            assert plan.unmerge(merged)[b, :, 0].nan_to_num(7).tolist() == [
                merged[b, own, 0].nan_to_num(7).item() for own in slots[b % batch]
            ]
            assert plan.select(x)[b, :, 0].nan_to_num(7).tolist() == [
                x[b, n, 0].nan_to_num(7).item() for n in anchors[b % batch]
            ]


@CASES
@given(st.integers(1, 16), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), RANDOM)
def test_plans_of_plans(num_tokens: int, batch: int, leading: int, trailing: int, rng: random.Random) -> None:
    """Catches offsets of text, of frames and of plans of other batches that are left out."""
    plan = random_plan(rng, batch, num_tokens)
    own = destinations(plan)
    assert plan.sizes().tolist() == [
        [row.count(slot) for slot in range(plan.num_slots)] for row in plan.slot_BN.tolist()
    ]
    total = leading + num_tokens + trailing
    wide = [[n - leading if leading <= n < leading + num_tokens else None for n in range(total)]] * batch
    assert destinations(plan.between(leading, trailing)) == [
        [n if place is None else leading + row[place] for n, place in enumerate(places)]
        for row, places in zip(own, wide, strict=True)
    ]
    later = random_plan(rng, rng.choice([1, batch]), plan.num_slots)
    anchors, twice = plan.anchor_BM.tolist(), destinations(later)
    joined = plan.then(later)
    assert destinations(joined) == [
        [anchors[b][twice[b % len(twice)][slot]] for slot in plan.slot_BN[b].tolist()] for b in range(batch)
    ]
    frames = rng.choice([f for f in (1, 2, 3) if batch % f == 0])
    assert destinations(one_sequence(plan, frames)) == [
        [frame * num_tokens + n for frame in range(frames) for n in own[video * frames + frame]]
        for video in range(batch // frames)
    ]
    assert [destinations(row) for row in plan.by_row()] == [[row] for row in own]
    value = torch.tensor([[rng.random() for _ in range(num_tokens)] for _ in range(batch)], dtype=torch.float64)
    torch.testing.assert_close(mean_one(value), value / value.mean(1, keepdim=True))


@CASES
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), RANDOM)
def test_attention_values(num_queries: int, num_keys: int, heads: int, rng: random.Random) -> None:
    """Catches a softmax over the wrong axis, a missing scale, and a mean over fewer heads or queries."""

    def drawn(count: int) -> list[list[list[float]]]:
        return [[[rng.gauss(0, 2) for _ in range(3)] for _ in range(count)] for _ in range(heads)]

    q, k = drawn(num_queries), drawn(num_keys)
    bias, is_word = [rng.gauss(0, 1) for _ in range(num_keys)], [rng.random() < 0.5 for _ in range(num_keys)]
    query, key = (torch.tensor([x], dtype=torch.float64) for x in (q, k))
    found = attention_column_mean(query, key, torch.tensor([bias], dtype=torch.float64))
    wanted = oracles.attention_column_mean(q, k, bias)
    torch.testing.assert_close(found, torch.tensor([wanted], dtype=torch.float64))
    shares = text_attention(query, key, torch.tensor([is_word]))
    for n in range(num_queries):
        rows = oracles.attention_column_mean([[head[n]] for head in q], k, [0.0] * num_keys)
        assert math.isclose(shares[0, n].item(), sum(v for v, w in zip(rows, is_word, strict=True) if w), abs_tol=1e-12)
