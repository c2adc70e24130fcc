"""Slow loops that define right answers, written from the formulas and never from the library's code."""

from __future__ import annotations

import math


def merge(slots: list[int], num_slots: int, rows: list[list[float]], weights: list[float]) -> list[list[float]]:
    """The weighted mean of the rows of each slot."""
    merged = []
    for slot in range(num_slots):
        members = [n for n in range(len(slots)) if slots[n] == slot]
        total = sum(weights[n] for n in members)
        merged.append([sum(weights[n] * rows[n][c] for n in members) / total for c in range(len(rows[0]))])
    return merged


def cosine(a: list[float], b: list[float]) -> float:
    """The cosine of two vectors; 0 where one of them is all zero."""
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b, strict=True)) / lengths if lengths else 0.0


def match(
    rows: list[list[float]],
    destinations_of: dict[int, list[int]],
    num_removed: int,
    penalty: list[float],
) -> list[int]:
    """The final destination of each token; `destinations_of` maps each source to those it is compared with."""
    scored = []
    for source, candidates in destinations_of.items():
        if candidates and penalty[source] < math.inf:
            similarities = [cosine(rows[source], rows[j]) for j in candidates]
            best = max(similarities)
            scored.append((penalty[source] - best, source, candidates[similarities.index(best)]))
    final = list(range(len(rows)))
    for _, source, destination in sorted(scored)[:num_removed]:
        final[source] = destination
    return final


def tile_candidates(
    grid: tuple[int, int], tile: tuple[int, int], offset: tuple[int, int], destinations: list[int]
) -> dict[int, list[int]]:
    """For each source of a grid the destinations in its own tile; tiles begin `offset` before the grid does."""

    def tile_of(token: int) -> tuple[int, int]:
        row, column = divmod(token, grid[1])
        return (row + offset[0]) // tile[0], (column + offset[1]) // tile[1]

    sources = [n for n in range(grid[0] * grid[1]) if n not in destinations]
    return {n: [j for j in destinations if tile_of(j) == tile_of(n)] for n in sources}


def cells(grid: tuple[int, int], stride: tuple[int, int]) -> list[list[int]]:
    """The tokens of every cell, cells and tokens in raster order."""
    members: dict[tuple[int, int], list[int]] = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            members.setdefault((row // stride[0], column // stride[1]), []).append(row * grid[1] + column)
    return [members[key] for key in sorted(members)]


def attention_column_mean(q: list[list[list[float]]], k: list[list[list[float]]], log_size: list[float]) -> list[float]:
    """The mean over heads and queries of `softmax(q k^T / sqrt(D) + log_size)`, for q[head][query][channel]."""
    means = [0.0] * len(k[0])
    for q_head, k_head in zip(q, k, strict=True):
        for query in q_head:
            logits = [
                sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) + bias
                for key, bias in zip(k_head, log_size, strict=True)
            ]
            exponents = [math.exp(logit - max(logits)) for logit in logits]
            for n, exponent in enumerate(exponents):
                means[n] += exponent / sum(exponents) / (len(q) * len(q_head))
    return means
