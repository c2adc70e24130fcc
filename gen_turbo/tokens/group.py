"""Groups around centres that begin on the grid: each token joins the most similar one near it.

Shape names: B batch, N tokens, C channels, G groups with a place on the grid, T tiles, P tokens of a tile,
K groups that a tile can reach, W groups that a token can reach.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.select import pool_cells
from gen_turbo.tokens.token_map import TokenMap

_TILE = 8


class _Layout(NamedTuple):
    """Who may join whom: tiles of tokens, the groups in reach of each tile, and which are too far for which token."""

    seeds: TokenMap
    token_TP: Tensor
    place_N: Tensor
    reach_TK: Tensor
    is_far_TPK: Tensor


def group_tokens(
    metric_BNC: Tensor,
    grid: tuple[int, int],
    num_groups: int,
    window: int = 3,
    num_refinements: int = 1,
    num_free: int = 0,
) -> TokenMap:
    """Groups tokens by similarity to centres that start as the middle tokens of grid cells.

    Hard assignment as in the grouping layer of VisToG (arXiv 2411.17773), without training: cells stand for its
    semantic tokens, a window keeps groups together, and spherical k-means (Dhillon and Modha, 2001) refines them: no
    step lowers the sum of similarities between tokens and centres. A group left without members, or begun without a
    cell, goes to the token that is least like its centre, alone; so the number is exact and shapes are static.

    Memory is linear in N: a token is compared with the few groups in reach of its tile of 8 x 8 tokens.

    Args:
        metric_BNC: What similarity is measured on, by cosine in at least float32, tokens in raster order. Tokens that
            hold NaN or infinity are the least like any.
        grid: (height, width) in tokens; (1, N) for a line.
        num_groups: Groups to make, 1 to N.
        window: A token may join the cells of this many bands, this many in each, around its own place; odd.
        num_refinements: How often centres become the mean of their members and tokens choose again.
        num_free: How many of the groups begin without a cell.

    Returns:
        A plan with `num_groups` slots; the anchor of each is the member most like its centre, of several that are as
        like but for rounding the first.

    Raises:
        ValueError: If the grid does not hold N tokens or a number is out of range.
    """
    batch, num_tokens, _ = metric_BNC.shape
    if grid[0] * grid[1] != num_tokens:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not hold {num_tokens} tokens; pass (h, w)")
    if not 1 <= num_groups - num_free <= num_groups <= num_tokens:
        raise ValueError(f"cannot make {num_groups} groups, {num_free} of them free, of {num_tokens} tokens")
    if window < 1 or window % 2 == 0 or num_refinements < 0:
        raise ValueError(f"window must be odd and refinements not negative; got {window} and {num_refinements}")
    if num_groups == num_tokens:
        return TokenMap.identity(batch, num_tokens, metric_BNC.device)
    with torch.no_grad():
        layout = _layout(grid, num_groups - num_free, window, metric_BNC.device)
        # Made contiguous, lest sums in another order choose otherwise.
        metric = metric_BNC.detach().to(torch.promote_types(metric_BNC.dtype, torch.float32)).contiguous()
        unit_BNC = F.normalize(metric, dim=-1)
        slot_BN, similarity_BN = _refined(unit_BNC, layout, num_refinements)
        return _filled(slot_BN, similarity_BN, layout.seeds.num_slots, num_groups)


def cell_windows(cells: TokenMap, grid: tuple[int, int], window: int) -> Tensor:
    """Lists the cells around each token when a grid is covered as by `pool_cells`, in bands of rows.

    The cells of a token are those of `window` bands around its own, in each as many around the token's column.

    Returns:
        (N, window ** 2) int64; instead of a cell off the grid another in reach is listed again.
    """
    slot_YX = cells.slot_BN.view(grid)
    is_top_Y = slot_YX[:, 0].diff(prepend=slot_YX.new_tensor([-1])) > 0
    band_Y = is_top_Y.cumsum(0) - 1
    slot_RX = slot_YX[is_top_Y]
    start_R = slot_RX[:, 0]
    end_R = torch.cat([start_R[1:], start_R.new_tensor([cells.num_slots])])
    reach = torch.arange(-(window // 2), window // 2 + 1)
    # Instead of a band beyond the grid the outermost one, which is in reach, once more.
    band_YW = (band_Y[:, None] + reach).clamp(0, len(start_R) - 1)
    cell = slot_RX[band_YW][..., None] + reach
    first, end = start_R[band_YW][:, :, None, None], end_R[band_YW][:, :, None, None]
    cell = torch.where((cell >= first) & (cell < end), cell, slot_YX[:, None, :, None])
    return cell.transpose(1, 2).reshape(-1, window**2)


def _refined(unit_BNC: Tensor, layout: _Layout, num_refinements: int) -> tuple[Tensor, Tensor]:
    """Gives each token its group and its cosine to the group's centre."""
    tiles_BTPC = _rows(unit_BNC, layout.token_TP)
    centre_BGC = layout.seeds.select(unit_BNC)
    slot_BN, similarity_BN = _nearest(tiles_BTPC, centre_BGC, layout)
    for _ in range(num_refinements):
        # Merging reads slots alone, so groups that have lost their anchor, or all members, do no harm.
        members = TokenMap(slot_BN, layout.seeds.anchor_BM.expand(len(slot_BN), -1))
        mean_BGC = members.merge(unit_BNC)
        length = torch.linalg.vector_norm(mean_BGC, dim=-1, keepdim=True)
        centre_BGC = torch.where(length > 0, mean_BGC / length, centre_BGC)
        slot_BN, similarity_BN = _nearest(tiles_BTPC, centre_BGC, layout)
    return slot_BN, similarity_BN


def _nearest(tiles_BTPC: Tensor, centre_BGC: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    similarity = tiles_BTPC @ _rows(centre_BGC, layout.reach_TK).mT
    similarity = similarity.nan_to_num_(nan=-2.0).masked_fill_(layout.is_far_TPK, -torch.inf)
    best, index = similarity.max(-1)
    slot = layout.reach_TK.expand(len(index), -1, -1).gather(2, index)
    return slot.flatten(1).index_select(1, layout.place_N), best.flatten(1).index_select(1, layout.place_N)


def _rows(x_BNC: Tensor, index_TP: Tensor) -> Tensor:
    """Takes (B, T, P, C) out of (B, N, C)."""
    batch, _, channels = x_BNC.shape
    return x_BNC.index_select(1, index_TP.reshape(-1)).view(batch, *index_TP.shape, channels)


def _filled(slot_BN: Tensor, similarity_BN: Tensor, num_cells: int, num_groups: int) -> TokenMap:
    """Makes the plan; groups without members go to the tokens least like their centre, ties in token order."""
    batch, num_tokens = slot_BN.shape
    token_BN = torch.arange(num_tokens, device=slot_BN.device).expand(batch, -1)
    best_BG = similarity_BN.new_full((batch, num_cells), -torch.inf).scatter_reduce(1, slot_BN, similarity_BN, "amax")
    # Two members are as far from their mean: rounding must not decide between them.
    rounding = 16 * torch.finfo(similarity_BN.dtype).eps
    central_BN = token_BN.masked_fill(similarity_BN < best_BG.gather(1, slot_BN) - rounding, num_tokens)
    anchor_BG = slot_BN.new_full((batch, num_cells), num_tokens).scatter_reduce(1, slot_BN, central_BN, "amin")
    destination_BN = anchor_BG.gather(1, slot_BN)
    num_alone = num_groups - (anchor_BG < num_tokens).sum(1, keepdim=True)
    order_BN = similarity_BN.masked_fill(destination_BN == token_BN, torch.inf).argsort(dim=1, stable=True)
    rank_BN = torch.empty_like(order_BN).scatter_(1, order_BN, token_BN)
    destination_BN = torch.where(rank_BN < num_alone, token_BN, destination_BN)
    return TokenMap.from_destinations(destination_BN, num_groups)


@lru_cache(maxsize=64)
def _layout(grid: tuple[int, int], num_cells: int, window: int, device: torch.device) -> _Layout:
    """Cuts a grid into tiles and finds the cells in reach; a function of its arguments, so its result is kept."""
    cells = pool_cells(grid, num_cells)
    window_NW = cell_windows(cells, grid, window)
    token_TP, place_N = _tiles(grid)
    window_TX = window_NW[token_TP].flatten(1)
    listed, order = window_TX.sort(dim=1)
    # The cells of a tile, each once: a cell's column is how many others come before it.
    column = (listed.diff(dim=1, prepend=listed[:, :1]) > 0).cumsum(1)
    reach_TK = window_TX.new_zeros(len(listed), int(column.max()) + 1).scatter_(1, column, listed)
    column = torch.empty_like(column).scatter_(1, order, column).view(*token_TP.shape, -1)
    is_far_TPK = torch.ones(*token_TP.shape, reach_TK.shape[1], dtype=torch.bool).scatter_(2, column, False)
    seeds = TokenMap(cells.slot_BN.to(device), cells.anchor_BM.to(device))
    return _Layout(seeds, token_TP.to(device), place_N.to(device), reach_TK.to(device), is_far_TPK.to(device))


def _tiles(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Lists the tokens of each tile, edge tokens again where it hangs over, and each token's place in the list."""
    height, width = grid
    tile_height = min(height, _TILE)
    tile_width = min(width, _TILE * _TILE // tile_height)
    row = torch.arange(-(-height // tile_height) * tile_height).view(-1, 1, tile_height, 1)
    column = torch.arange(-(-width // tile_width) * tile_width).view(1, -1, 1, tile_width)
    token = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
    token_TP = token.reshape(-1, tile_height * tile_width)
    is_real = ((row < height) & (column < width)).reshape(-1)
    place = is_real.nonzero()[:, 0]
    place_N = torch.empty(height * width, dtype=torch.int64).index_copy(0, token_TP.reshape(-1)[place], place)
    return token_TP, place_N
