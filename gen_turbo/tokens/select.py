"""Plans that keep some tokens as they are: by score, by place, by diversity; each dropped token joins a kept one.

Shape names: B batch, N tokens, C channels, K kept.
"""

from __future__ import annotations

from itertools import pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.tables import counting
from gen_turbo.tokens.token_map import TokenMap


def keep_highest(score_BN: Tensor, num_kept: int) -> TokenMap:
    """Keeps the tokens of highest score in each row; ties in token order, dropped tokens join the nearest kept one.

    NaN is the lowest score.

    Raises:
        ValueError: If no token or more than all are to be kept.
    """
    num_tokens = score_BN.shape[1]
    _check(num_kept, num_tokens)
    order_BN = score_BN.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return keep_tokens(order_BN[:, :num_kept].sort(dim=1).values, num_tokens)


def keep_tokens(kept_BK: Tensor, num_tokens: int) -> TokenMap:
    """Keeps the named tokens (B, K), ascending; each dropped token joins the kept one nearest in token order."""
    token_BN = torch.arange(num_tokens, device=kept_BK.device).expand(len(kept_BK), -1).contiguous()
    after_BN = torch.searchsorted(kept_BK.contiguous(), token_BN).clamp(max=kept_BK.shape[1] - 1)
    before_BN = (after_BN - 1).clamp(min=0)
    is_before = token_BN - kept_BK.gather(1, before_BN) < (kept_BK.gather(1, after_BN) - token_BN).abs()
    return TokenMap(torch.where(is_before, before_BN, after_BN), kept_BK.contiguous())


def keep_spaced(num_tokens: int, num_kept: int, device: torch.device | str | None = None) -> TokenMap:
    """Keeps tokens at even distances along the line of tokens, as near its middle as its ends: a plan of one row.

    Raises:
        ValueError: If no token or more than all are to be kept.
    """
    _check(num_kept, num_tokens)
    place_K = (2 * torch.arange(num_kept, device=device) + 1) * num_tokens // (2 * num_kept)
    return keep_tokens(place_K[None], num_tokens)


def keep_diverse(features_BNC: Tensor, num_kept: int) -> TokenMap:
    """Keeps tokens that are as unlike each other as greedy choice makes them; dropped tokens join the most similar.

    The max-min diversity of DivPrune (Alvar et al., 2025, arXiv 2503.02175, Algorithm 1): the first token is the one
    farthest from its nearest neighbour, each further one the farthest from all those kept; distance is one minus
    cosine, and 3 from tokens that hold NaN or infinity. Costs an N x N similarity and K steps over N.

    Raises:
        ValueError: If no token or more than all are to be kept.
    """
    num_tokens = features_BNC.shape[1]
    _check(num_kept, num_tokens)
    # Made contiguous, lest sums in another order choose otherwise.
    features = features_BNC.to(torch.promote_types(features_BNC.dtype, torch.float32)).contiguous()
    features = F.normalize(features, dim=-1)
    similarity = torch.bmm(features, features.mT).nan_to_num_(nan=-2.0)
    own = torch.eye(num_tokens, dtype=torch.bool, device=similarity.device)
    nearest_BN = similarity.masked_fill(own, -torch.inf).amax(2)
    kept = [nearest_BN.argmin(1)]
    rows = torch.arange(len(similarity), device=similarity.device)
    # A kept token is as near to itself as can be, so that it is not kept again.
    to_others = similarity.masked_fill(own, torch.inf)
    nearest_BN = to_others[rows, kept[0]]
    for _ in range(num_kept - 1):
        kept.append(nearest_BN.argmin(1))
        nearest_BN = torch.maximum(nearest_BN, to_others[rows, kept[-1]])
    return join_similar(similarity, torch.stack(kept, 1).sort(dim=1).values)


def join_similar(similarity_BNN: Tensor, kept_BK: Tensor) -> TokenMap:
    """Keeps the named tokens (B, K), ascending; each dropped token joins the kept one that it is most similar to."""
    num_tokens, num_kept = similarity_BNN.shape[1], kept_BK.shape[1]
    to_kept = similarity_BNN.gather(2, kept_BK[:, None].expand(-1, num_tokens, -1))
    slot_BN = to_kept.argmax(2).scatter(1, kept_BK, counting(len(kept_BK), num_kept, kept_BK.device))
    return TokenMap(slot_BN, kept_BK)


def pool_cells(grid: tuple[int, int], num_kept: int, device: torch.device | str | None = None) -> TokenMap:
    """Covers a grid with `num_kept` rectangular cells, nearly square and nearly equal: a plan of one row.

    Bands of rows share the cells as evenly as whole numbers allow, and each band is cut into its own number of them.
    A cell's anchor is its middle token.

    Raises:
        ValueError: If no token or more than all are to be kept.
    """
    height, width = grid
    _check(num_kept, height * width)
    wanted = round((num_kept * height / width) ** 0.5)
    num_bands = min(height, num_kept, max(-(-num_kept // width), wanted))
    # In plain numbers, so that one operator makes the whole plan's tensor.
    destinations: list[int] = []
    for band in range(num_bands):
        top, bottom = band * height // num_bands, (band + 1) * height // num_bands
        count = (band + 1) * num_kept // num_bands - band * num_kept // num_bands
        edges = [cell * width // count for cell in range(count + 1)]
        row = [
            (top + bottom - 1) // 2 * width + (left + right - 1) // 2
            for left, right in pairwise(edges)
            for _ in range(left, right)
        ]
        destinations += row * (bottom - top)
    return TokenMap.from_destinations(torch.tensor([destinations], device=device), num_kept)


def shrunk_grid(grid: tuple[int, int], num_kept: int) -> tuple[int, int]:
    """The (height, width) of a smaller image of at most `num_kept` tokens, of the same shape as near as can be.

    Raises:
        ValueError: If no token or more than all are to be kept.
    """
    height, width = grid
    _check(num_kept, height * width)
    # In whole numbers, lest 8 of 16 rows at a quarter become 7. Where one column is left, all that are kept are rows.
    rows = min(num_kept, max(1, isqrt(num_kept * height // width)))
    return rows, max(1, min(width, num_kept // rows, round(rows * width / height)))


def shrink_cells(grid: tuple[int, int], smaller: tuple[int, int], device: torch.device | str | None = None) -> TokenMap:
    """Covers a grid with the tokens of a smaller image, in raster order: a plan of one row.

    A token belongs to the cell that its own middle lies in. A cell's anchor is its middle token.
    """
    (height, width), (rows, columns) = grid, smaller

    def line(num_tokens: int, num_cells: int) -> tuple[Tensor, Tensor]:
        cell = (2 * torch.arange(num_tokens, device=device) + 1) * num_cells // (2 * num_tokens)
        anchor = (2 * torch.arange(num_cells, device=device) + 1) * num_tokens // (2 * num_cells)
        return cell, anchor

    (row_cell, row_anchor), (column_cell, column_anchor) = line(height, rows), line(width, columns)
    slot = row_cell[:, None] * columns + column_cell
    anchor = row_anchor[:, None] * width + column_anchor
    return TokenMap(slot.reshape(1, -1), anchor.reshape(1, -1))


def _check(num_kept: int, num_tokens: int) -> None:
    if not 1 <= num_kept <= num_tokens:
        raise ValueError(f"cannot keep {num_kept} of {num_tokens} tokens; choose a ratio that keeps at least one")
