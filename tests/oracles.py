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


def likeness(a: list[float], b: list[float]) -> float:
    """The cosine of two vectors; -2 where one of them holds what is no number."""
    return cosine(a, b) if all(map(math.isfinite, (*a, *b))) else -2.0


def match(
    rows: list[list[float]],
    destinations_of: dict[int, list[int]],
    num_removed: int,
    penalty: list[float],
) -> list[int]:
    """The final destination of each token; `destinations_of` maps each source to those it is compared with."""
    scored = []
    for source, candidates in destinations_of.items():
        if candidates and penalty[source] != math.inf:
            similarities = [likeness(rows[source], rows[j]) for j in candidates]
            best = max(similarities)
            cost = 2.0 if math.isnan(penalty[source]) else penalty[source] - best
            scored.append((cost, source, candidates[similarities.index(best)]))
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


def pool_cells(grid: tuple[int, int], slots: list[int]) -> list[tuple[int, int, int, int]]:
    """The (top, bottom, left, right) of each slot of a covered grid, ends excluded; asserts rectangles."""
    found = []
    for slot in range(max(slots) + 1):
        places = [divmod(n, grid[1]) for n, own in enumerate(slots) if own == slot]
        rows, columns = {row for row, _ in places}, {column for _, column in places}
        box = min(rows), max(rows) + 1, min(columns), max(columns) + 1
        assert len(places) == (box[1] - box[0]) * (box[3] - box[2])
        found.append(box)
    return found


def windows(grid: tuple[int, int], slots: list[int], window: int) -> list[list[int]]:
    """The slots of each token's own band and those `window // 2` around it, as many around the token's column."""
    rows = [slots[start : start + grid[1]] for start in range(0, len(slots), grid[1])]
    bands = [row for index, row in enumerate(rows) if index == 0 or row != rows[index - 1]]
    half, found = window // 2, []
    for row in rows:
        here = bands.index(row)
        near = bands[max(0, here - half) : here + half + 1]
        for column in range(grid[1]):
            reached = {s for band in near for s in range(band[column] - half, band[column] + half + 1) if s in band}
            found.append(sorted(reached))
    return found


def group(
    rows: list[list[float]], seeds: list[int], allowed: list[list[int]], num_groups: int, num_refinements: int
) -> list[int]:
    """The token whose place each token takes: spherical k-means inside windows, what is least alike alone."""
    centres = [rows[seed] for seed in seeds]
    for refinement in range(num_refinements + 1):
        alike = [[likeness(row, centres[g]) for g in near] for row, near in zip(rows, allowed, strict=True)]
        own = [near[values.index(max(values))] for values, near in zip(alike, allowed, strict=True)]
        if refinement == num_refinements:
            break
        for g in range(len(centres)):
            members = [
                [v / math.hypot(*row) if any(row) else 0.0 for v in row]
                for row, o in zip(rows, own, strict=True)
                if o == g
            ]
            mean = [sum(values) / len(members) for values in zip(*members, strict=True)]
            centres[g] = mean if any(mean) and all(map(math.isfinite, mean)) else centres[g]
    best = [max(values) for values in alike]
    anchors = {}
    for g in set(own):
        most = max(value for value, o in zip(best, own, strict=True) if o == g)
        anchors[g] = next(n for n, o in enumerate(own) if o == g and best[n] >= most - 1e-12)
    others = sorted(set(range(len(rows))) - set(anchors.values()), key=lambda n: (best[n], n))
    alone = set(others[: num_groups - len(anchors)])
    return [n if n in alone else anchors[g] for n, g in enumerate(own)]


def keep_diverse(rows: list[list[float]], num_kept: int) -> list[int]:
    """The token whose place each token takes, by greedy max-min diversity of cosines."""
    count = len(rows)
    alike = [[likeness(a, b) for b in rows] for a in rows]
    nearest = [max((alike[i][j] for j in range(count) if j != i), default=0.0) for i in range(count)]
    kept = [nearest.index(min(nearest))]
    while len(kept) < num_kept:
        to_kept = {i: max(alike[i][k] for k in kept) for i in range(count) if i not in kept}
        kept.append(min(to_kept, key=lambda i: (to_kept[i], i)))
    kept.sort()
    return [i if i in kept else max(kept, key=lambda k, i=i: alike[i][k]) for i in range(count)]


def farthest(rows: list[list[float]], num_kept: int) -> list[int]:
    """The token whose place each token takes, by greedy k-centre clustering from the first token on."""

    def between(a: list[float], b: list[float]) -> float:
        squares = sum((v - w) * (v - w) for v, w in zip(a, b, strict=True))
        return squares if squares < math.inf else math.inf

    kept, owner, distance = [0], [0] * len(rows), [math.inf] * len(rows)
    while True:
        for i, row in enumerate(rows):
            if between(row, rows[kept[-1]]) < distance[i]:
                owner[i], distance[i] = kept[-1], between(row, rows[kept[-1]])
        if len(kept) == num_kept:
            return [i if i in kept else owner[i] for i in range(len(rows))]
        kept.append(max((i for i in range(len(rows)) if i not in kept), key=lambda i: (distance[i], -i)))


def drawn(cell: int, seed: int, count: int) -> int:
    """Which of a cell's tokens a seed draws, in whole numbers without a bound."""
    state = (cell + seed * 0x9E3779B1) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
        state = (state ^ (state >> shift)) * factor % 2**32
    return (state ^ (state >> 16)) % count
