"""The pure functions against plain loops, on thin grids, broken numbers, ties, half types and any memory layout.

2,000 cases, always the same; GEN_TURBO_FUZZ=100000 runs as many of them.
"""

from __future__ import annotations

import math
import os
import random
from fractions import Fraction
from typing import NamedTuple

import oracles
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gen_turbo.tokens.farthest import farthest_point_plan
from gen_turbo.tokens.frames import one_sequence
from gen_turbo.tokens.group import cell_windows, group_tokens
from gen_turbo.tokens.match import bipartite_soft_matching, line_soft_matching, tile_soft_matching
from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.score import attention_column_mean, mean_one, text_attention
from gen_turbo.tokens.select import (
    keep_diverse,
    keep_highest,
    keep_spaced,
    keep_tokens,
    pool_cells,
    shrink_cells,
    shrunk_grid,
)
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


@CASES
@given(st.integers(1, 30), RANDOM)
def test_matching_over_all_pairs(num_tokens: int, rng: random.Random) -> None:
    """Catches a broken destination that takes all sources, NaN that receives, and ties by anything but place."""
    receivers = rng.sample(range(num_tokens), rng.randint(0, num_tokens))
    sources = {i: receivers for i in range(num_tokens) if i not in receivers}
    matched(
        rng,
        tokens(rng, num_tokens),
        sources,
        lambda x, count, penalty: bipartite_soft_matching(
            x, torch.tensor(receivers, dtype=torch.int64), count, penalty
        ),
    )


@CASES
@given(GRID, st.integers(1, 9), st.tuples(st.integers(1, 4), st.integers(1, 4)), RANDOM)
def test_matching_in_tiles_and_lines(grid, tile, stride, rng) -> None:
    """Catches broken tokens of a tile without destinations that leave to token 0, which need not stay."""
    shift, variant = rng.random() < 0.5, rng.choice(["corner", rng.randrange(10**6)])
    chosen = grid_destinations(grid, stride, variant).tolist()
    offset = tuple(tile // 2 if shift and side > tile else 0 for side in grid)
    given = tokens(rng, math.prod(grid))
    matched(
        rng,
        given,
        oracles.tile_candidates(grid, (tile, tile), offset, chosen),
        lambda x, count, penalty: tile_soft_matching(x, grid, count, tile, stride, shift, penalty, variant),
    )
    line = oracles.tile_candidates((1, math.prod(grid)), (1, tile), (0, 0), list(range(0, math.prod(grid), stride[0])))
    matched(rng, given, line, lambda x, count, penalty: line_soft_matching(x, count, stride[0], tile, penalty))


@CASES
@given(GRID, st.sampled_from([1, 3, 5, 7]), st.integers(0, 3), RANDOM)
def test_grouping(grid, window, num_refinements, rng) -> None:
    """Catches groups that follow the memory's layout or rounding, and broken tokens that spoil a centre."""
    num_tokens = math.prod(grid)
    num_groups = rng.randint(1, num_tokens)
    num_free = rng.randint(0, num_groups - 1)
    # Means of ties are rounded, and so is which of them is nearer.
    given = tokens(rng, num_tokens, is_tied=False if num_refinements else None)
    plan = group_tokens(given.x, grid, num_groups, window, num_refinements, num_free)
    cells = pool_cells(grid, num_groups - num_free)
    allowed = oracles.windows(grid, cells.slot_BN[0].tolist(), window)
    assert [sorted(set(near)) for near in cell_windows(cells, grid, window).tolist()] == allowed
    for row, own in zip(given.rows, destinations(plan), strict=True):
        if num_groups == num_tokens:
            assert own == list(range(num_tokens))
        else:
            seeds = cells.anchor_BM[0].tolist()
            assert own == oracles.group(row, seeds, allowed, num_groups, num_refinements)


@CASES
@given(st.integers(1, 24), RANDOM)
def test_what_differs_is_kept(num_tokens: int, rng: random.Random) -> None:
    """Catches one token kept twice, as NaN was, and choices that follow the memory's layout."""
    num_kept = rng.randint(1, num_tokens)
    tied = tokens(rng, num_tokens, is_tied=True)
    for row, own in zip(tied.rows, destinations(keep_diverse(tied.x, num_kept)), strict=True):
        assert own == oracles.keep_diverse(row, num_kept)
    any_tokens = tokens(rng, num_tokens)
    for row, own in zip(any_tokens.rows, destinations(farthest_point_plan(any_tokens.x, num_kept)), strict=True):
        assert own == oracles.farthest(row, num_kept)
    x = torch.randn(2, num_tokens, 48, generator=torch.Generator().manual_seed(rng.randrange(2**32)))
    for choose in (keep_diverse, farthest_point_plan):
        assert destinations(choose(laid_out(x, rng), num_kept)) == destinations(choose(x, num_kept))


@CASES
@given(st.integers(1, 30), RANDOM)
def test_what_is_named_is_kept(num_tokens: int, rng: random.Random) -> None:
    """Catches NaN as the highest score, ties out of order, and tokens that join a farther one."""
    num_kept = rng.randint(1, num_tokens)
    scores = [rng.choice([0.0, 0.25, 1.0, 4.0, *BROKEN]) for _ in range(num_tokens)]
    worth = [-math.inf if math.isnan(score) else score for score in scores]
    highest = sorted(sorted(range(num_tokens), key=lambda n: (-worth[n], n))[:num_kept])
    spaced = [(2 * k + 1) * num_tokens // (2 * num_kept) for k in range(num_kept)]
    chosen = sorted(rng.sample(range(num_tokens), num_kept))
    for plan, kept in (
        (keep_highest(torch.tensor([scores], dtype=rng.choice(DTYPES)), num_kept), highest),
        (keep_spaced(num_tokens, num_kept), spaced),
        (keep_tokens(torch.tensor([chosen]), num_tokens), chosen),
    ):
        assert destinations(plan) == [[min(kept, key=lambda k, n=n: (abs(k - n), -k)) for n in range(num_tokens)]]


@CASES
@given(GRID, RANDOM)
def test_grids_are_covered_and_made_smaller(grid, rng) -> None:
    """Catches thin grids that keep more than asked, cells that are no rectangles, and a shape that is squeezed."""
    height, width = grid
    num_kept = rng.randint(1, height * width)
    plan = pool_cells(grid, num_kept)
    boxes = oracles.pool_cells(grid, plan.slot_BN[0].tolist())
    assert len(boxes) == num_kept
    middles = [(top + bottom - 1) // 2 * width + (left + right - 1) // 2 for top, bottom, left, right in boxes]
    assert plan.anchor_BM[0].tolist() == middles
    bands = sorted({box[:2] for box in boxes})
    assert [end for _, end in bands[:-1]] == [start for start, _ in bands[1:]]
    for sides in ([end - start for start, end in bands], [sum(box[:2] == band for box in boxes) for band in bands]):
        assert max(sides) - min(sides) <= 1
    for band in bands:
        sides = [right - left for top, bottom, left, right in boxes if (top, bottom) == band]
        assert max(sides) - min(sides) <= 1
    rows, columns = shrunk_grid(grid, num_kept)
    wanted = max([1, *(r for r in range(1, height + 1) if r * r * width <= num_kept * height)])
    assert rows == min(wanted, num_kept) and 1 <= rows * columns <= num_kept and columns <= width
    assert columns == max(1, min(width, num_kept // rows, round(rows * width / height)))
    smaller = shrink_cells(grid, (rows, columns))
    own = [
        (2 * row + 1) * rows // (2 * height) * columns + (2 * column + 1) * columns // (2 * width)
        for row in range(height)
        for column in range(width)
    ]
    assert smaller.slot_BN[0].tolist() == own
    for slot, (top, bottom, left, right) in enumerate(oracles.pool_cells(grid, own)):
        row, column = divmod(int(smaller.anchor_BM[0, slot]), width)
        assert abs(2 * row + 1 - top - bottom) <= 1 and abs(2 * column + 1 - left - right) <= 1


@CASES
@given(GRID, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(-(2**40), 2**40))
def test_cells_have_one_destination(grid, stride, seed) -> None:
    """Catches cells at an edge that draw a token they do not have, and a hash that depends on the platform."""
    cells = oracles.cells(grid, stride)
    corners = [cell[0] for cell in cells]
    assert grid_destinations(grid, stride).tolist() == sorted(corners)
    drawn = [cell[oracles.drawn(cell[0], seed, len(cell))] for cell in cells]
    assert grid_destinations(grid, stride, seed).tolist() == sorted(drawn)


@CASES
@given(st.integers(0, 5000), st.integers(0, 10**6), st.sampled_from([10, 100, 1000, 10**6]))
def test_a_ratio_is_the_number_that_was_written(num_tokens: int, numerator: int, denominator: int) -> None:
    """Catches one token less than the decimal number says, and a last token that leaves."""
    ratio = numerator % denominator / denominator
    written = Fraction(numerator % denominator, denominator)
    assert num_removed(num_tokens, ratio) == math.floor(num_tokens * written)
    left = 1 - ratio
    assert num_removed(num_tokens, left) == min(math.floor(num_tokens * (1 - written)), max(0, num_tokens - 1))


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
