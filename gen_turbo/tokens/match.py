"""Bipartite soft matching: the sources most similar to a destination leave, over all pairs or inside tiles.

Shape names: B batch, N tokens, C channels, T tiles, S sources of a tile, D destinations of a tile, P = D + S.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.token_map import TokenMap


class _Layout(NamedTuple):
    """Who is compared with whom: rows of tokens, destinations first, short rows filled up with token 0."""

    token_TP: Tensor
    filler_TD: Tensor | None
    place_N: Tensor
    num_destinations: int
    num_sources: int


def bipartite_soft_matching(
    metric_BNC: Tensor,
    destinations_D: Tensor,
    num_removed: int,
    penalty_BN: Tensor | None = None,
) -> TokenMap:
    """Merges the sources that are most similar to a destination, comparing each with every destination.

    Bipartite soft matching (Bolya et al., 2022, arXiv 2210.09461, Section 3): source i scores
    `max_j cos(i, j) - penalty_i`, the highest scores leave, each into `argmax_j cos(i, j)`. The penalty is that of
    Turbo (Ju et al., 2023, arXiv 2312.07408): a token's semantic value decides whether it merges, never into which.

    Args:
        metric_BNC: What similarity is measured on, by cosine in at least float32. All-zero tokens are similar to none,
            and tokens that hold NaN or infinity are the least similar to any.
        destinations_D: Tokens that stay and receive, (D,) int64, distinct. All others are sources.
        num_removed: How many sources leave in each row, at most their number. Ties leave in token order, and
            among equally similar destinations the first receives.
        penalty_BN: Is taken off each source's similarity; infinite keeps a token. One row serves any batch.

    Returns:
        A plan with `N - num_removed` slots whose anchors ascend.

    Raises:
        ValueError: If more tokens are to leave than there are sources of finite penalty, or shapes do not fit.
    """
    num_tokens = metric_BNC.shape[1]
    destinations = destinations_D.to(metric_BNC.device)
    is_source = torch.ones(num_tokens, dtype=torch.bool, device=metric_BNC.device)
    is_source[destinations] = False
    num_sources = num_tokens - len(destinations)
    rank_N = is_source.cumsum(0) - 1
    # Sources in token order come first in a stable sort of "is no source".
    sources = (~is_source).to(torch.uint8).argsort(stable=True)[:num_sources]
    layout = _Layout(
        token_TP=torch.cat([destinations, sources])[None],
        filler_TD=None,
        place_N=rank_N.masked_fill(~is_source, num_sources),
        num_destinations=len(destinations),
        num_sources=num_sources if len(destinations) else 0,
    )
    return _match(metric_BNC, layout, num_removed, penalty_BN)


def tile_soft_matching(
    metric_BNC: Tensor,
    grid: tuple[int, int],
    num_removed: int,
    tile: int = 8,
    stride: tuple[int, int] = (2, 2),
    shift: bool = False,
    penalty_BN: Tensor | None = None,
    variant: str | int = "corner",
) -> TokenMap:
    """Merges as `bipartite_soft_matching` does, comparing tokens only inside square tiles of a grid.

    The scores of all tiles compete for one budget per batch row, so a flat tile gives up more tokens than a busy
    one. For N tokens costs `tile ** 2 / N` of matching over all pairs. Any rectangle will do: tiles cut off by an
    edge are smaller, and a source whose tile has no destination stays.

    Args:
        metric_BNC: What similarity is measured on, tokens in raster order.
        grid: (height, width) in tokens.
        num_removed: How many sources leave in each batch row.
        tile: Side of a tile in tokens.
        stride: (height, width) of the cells that have one destination each.
        shift: Moves the tiles by half a tile along each side longer than one tile. Taking turns hides seams.
        penalty_BN: Is taken off each source's similarity; infinite keeps a token. One row serves any batch.
        variant: Which token of a cell is the destination, see `grid_destinations`.

    Returns:
        A plan with `N - num_removed` slots whose anchors ascend.

    Raises:
        ValueError: If the grid does not hold N tokens, or more are to leave than there are sources of finite
            penalty in tiles with a destination.
    """
    height, width = grid
    if height * width != metric_BNC.shape[1]:
        raise ValueError(f"a grid of {height} x {width} does not hold {metric_BNC.shape[1]} tokens; pass (h, w)")
    if tile < 1:
        raise ValueError(f"tile must be at least 1 token, got {tile}")
    layout = _tile_layout(grid, (tile, tile), stride, shift, variant, metric_BNC.device)
    return _match(metric_BNC, layout, num_removed, penalty_BN)


def line_soft_matching(
    metric_BNC: Tensor, num_removed: int, stride: int = 4, tile: int = 64, penalty_BN: Tensor | None = None
) -> TokenMap:
    """Merges as `tile_soft_matching` does where no grid is known: tiles and cells are runs of the line of tokens.

    Args:
        metric_BNC: What similarity is measured on.
        num_removed: How many sources leave in each batch row.
        stride: Every `stride`-th token is a destination.
        tile: Length of the runs inside which tokens are compared.
        penalty_BN: Is taken off each source's similarity; infinite keeps a token. One row serves any batch.

    Returns:
        A plan with `N - num_removed` slots whose anchors ascend.

    Raises:
        ValueError: If more tokens are to leave than there are sources of finite penalty.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 token, got {tile}")
    layout = _tile_layout((1, metric_BNC.shape[1]), (1, tile), (1, stride), False, "corner", metric_BNC.device)
    return _match(metric_BNC, layout, num_removed, penalty_BN)


def _match(metric_BNC: Tensor, layout: _Layout, num_removed: int, penalty_BN: Tensor | None) -> TokenMap:
    batch, num_tokens, _ = metric_BNC.shape
    if not 0 <= num_removed <= layout.num_sources:
        raise ValueError(
            f"cannot remove {num_removed} of {num_tokens} tokens: {layout.num_sources} are sources that can leave; "
            "lower `ratio` or use a larger `stride`"
        )
    if num_removed == 0:
        return TokenMap.identity(batch, num_tokens, metric_BNC.device)
    with torch.no_grad():
        similarity_BN, nearest_BN = _nearest_destinations(metric_BNC.detach(), layout)
        token_N = torch.arange(num_tokens, device=metric_BNC.device)
        destination_BN = torch.where(leaving(similarity_BN, num_removed, penalty_BN), nearest_BN, token_N)
        return TokenMap.from_destinations(destination_BN, num_tokens - num_removed)


def _nearest_destinations(metric_BNC: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Gives each token its highest cosine and the destination that has it; no source: minus infinity, any token."""
    batch, _, channels = metric_BNC.shape
    num_tiles, side = layout.token_TP.shape
    rows = metric_BNC.index_select(1, layout.token_TP.reshape(-1)).view(batch, num_tiles, side, channels)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    count = layout.num_destinations
    # The source's own length cannot change which destination is nearest, so it divides the winner alone.
    similarity = rows[:, :, count:] @ (rows[:, :, :count] / length[:, :, :count]).mT
    # What is no number is less alike than any two tokens that are, and still more than no destination at all.
    least = torch.finfo(rows.dtype).min
    similarity = similarity.nan_to_num_(nan=least, posinf=least)
    if layout.filler_TD is not None:
        similarity = similarity.masked_fill(layout.filler_TD[:, None, :], -torch.inf)
    best, index = similarity.max(-1)
    length_TS = length[:, :, count:, 0]
    best = (best / length_TS).clamp_min(-2.0).masked_fill(~length_TS.isfinite(), -2.0)
    if layout.filler_TD is not None:
        # Destinations come before fillers: a tile that begins with a filler has none.
        best = best.masked_fill(layout.filler_TD[:, :1], -torch.inf)
    nearest = layout.token_TP[:, :count].expand(batch, -1, -1).gather(2, index)
    none = best.new_full((batch, 1), -torch.inf)
    # Tokens that are no source read the column behind the sources.
    similarity_BN = torch.cat([best.flatten(1), none], 1).index_select(1, layout.place_N)
    nearest = torch.cat([nearest.flatten(1), torch.zeros_like(nearest[:, 0, :1])], 1)
    return similarity_BN, nearest.index_select(1, layout.place_N)


def nearest_in_tiles(
    metric_BNC: Tensor, grid: tuple[int, int], tile: int, stride: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gives each token of a grid its highest cosine to a destination of its tile, and that destination: (B, N) each.

    Destinations themselves, and sources of tiles without any, have minus infinity.
    """
    layout = _tile_layout(grid, (tile, tile), stride, False, "corner", metric_BNC.device)
    return _nearest_destinations(metric_BNC, layout)


def leaving(similarity_BN: Tensor, num_removed: int, penalty_BN: Tensor | None = None) -> Tensor:
    """Marks the tokens of highest similarity less penalty, as many as are to leave, ties in token order."""
    scores_BN = similarity_BN if penalty_BN is None else _penalised(similarity_BN, penalty_BN, num_removed)
    # Cheaper than a stable sort.
    last = scores_BN.topk(num_removed, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = scores_BN > last, scores_BN == last
    return above | (equal & (equal.cumsum(1) <= num_removed - above.sum(1, keepdim=True)))


def _penalised(similarity_BN: Tensor, penalty_BN: Tensor, num_removed: int) -> Tensor:
    if penalty_BN.ndim != 2 or penalty_BN.shape[1] != similarity_BN.shape[1]:
        raise ValueError(f"penalty_BN {tuple(penalty_BN.shape)} must be (batch, {similarity_BN.shape[1]} tokens)")
    scores_BN = (similarity_BN - penalty_BN.to(similarity_BN.dtype)).nan_to_num(nan=-2.0, neginf=-torch.inf)
    scores_BN = scores_BN.masked_fill(similarity_BN == -torch.inf, -torch.inf)
    # The device checks this in its own time; the host does not wait for the answer.
    torch._assert_async(
        ((scores_BN > -torch.inf).sum(1) >= num_removed).all(),
        f"cannot remove {num_removed} tokens: fewer sources have a finite penalty; lower `ratio` or protect less",
    )
    return scores_BN


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tile_layout(*of: Any) -> _Layout:
    """`_made_tile_layout`, which compiled code holds as a constant: it would look through a cache."""
    return _made_tile_layout(*of)


@lru_cache(maxsize=64)
def _made_tile_layout(
    grid: tuple[int, int],
    tile: tuple[int, int],
    stride: tuple[int, int],
    shift: bool,
    variant: str | int,
    device: torch.device,
) -> _Layout:
    """Sorts the tokens of a grid by tile, destinations first; a function of its arguments, so its result is kept."""
    height, width = grid
    offset = [side // 2 if shift and length > side else 0 for side, length in zip(tile, grid, strict=True)]
    row = (torch.arange(height) + offset[0]) // tile[0]
    column = (torch.arange(width) + offset[1]) // tile[1]
    num_columns = int(column[-1]) + 1
    num_tiles = (int(row[-1]) + 1) * num_columns
    tile_N = (row[:, None] * num_columns + column).reshape(-1)
    is_destination = torch.zeros(height * width, dtype=torch.bool)
    is_destination[grid_destinations(grid, stride, variant)] = True
    destination_TD, has_destination, _ = _rows_by_tile(tile_N, is_destination, num_tiles)
    source_TS, has_source, place_N = _rows_by_tile(tile_N, ~is_destination, num_tiles)
    filler_TD = None if bool(has_destination.all()) else (~has_destination).to(device)
    return _Layout(
        token_TP=torch.cat([destination_TD, source_TS], 1).to(device),
        filler_TD=filler_TD,
        place_N=place_N.to(device),
        num_destinations=destination_TD.shape[1],
        num_sources=int(has_source[has_destination.any(1)].sum()),
    )


def _rows_by_tile(tile_N: Tensor, chosen_N: Tensor, num_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists the chosen tokens of each tile, which entries are real, and each token's place in the flat list."""
    tokens = chosen_N.nonzero()[:, 0]
    tiles, order = tile_N[tokens].sort(stable=True)
    tokens = tokens[order]
    counts = torch.bincount(tiles, minlength=num_tiles)
    length = int(counts.max())
    place = tiles * length + torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[tiles]
    listed = torch.zeros(num_tiles * length, dtype=torch.int64).index_copy(0, place, tokens)
    is_real = torch.arange(length) < counts[:, None]
    place_N = torch.full_like(tile_N, num_tiles * length).index_copy(0, tokens, place)
    return listed.view(num_tiles, length), is_real, place_N
