"""Soft matching over the frames of a video: what does not change joins where it was first seen.

Shape names: B batch, T frames, N tokens of a frame, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.match import leaving, nearest_in_tiles
from gen_turbo.tokens.token_map import TokenMap


def video_soft_matching(
    metric_BLC: Tensor,
    num_frames: int,
    grid: tuple[int, int],
    num_removed: int,
    tile: int = 8,
    stride: tuple[int, int] = (2, 2),
    penalty_BL: Tensor | None = None,
) -> TokenMap:
    """Merges as `tile_soft_matching` does in every frame, and with the token of the same place one frame before.

    A token has two to merge with: the most similar destination of its tile, if it is no destination, and the token
    of its place in the frame before, if it has one. The more similar of the two decides, all tokens of the video
    compete for one budget, and a token that is removed joins the one its chain leads to, which is never later: a place
    that does not change is read once, in the frame that shows it first. All but the destinations of the first frame
    can leave.

    Args:
        metric_BLC: What similarity is measured on, by cosine in at least float32: `num_frames` frames of tokens in
            raster order, one behind the other. What is no number is the least similar to anything.
        num_frames: T.
        grid: (height, width) of a frame in tokens.
        num_removed: How many tokens leave in each row. Ties leave in token order.
        tile: Side of a tile in tokens.
        stride: (height, width) of the cells that have one destination each.
        penalty_BL: Is taken off each token's similarity. One row serves any batch.

    Returns:
        A plan with `L - num_removed` slots whose anchors ascend.

    Raises:
        ValueError: If the frames do not hold L tokens, or more are to leave than can.
    """
    batch, length, channels = metric_BLC.shape
    size = grid[0] * grid[1]
    if num_frames * size != length:
        raise ValueError(f"{num_frames} frames of {grid[0]} x {grid[1]} tokens are not {length} tokens")
    most = length - -(-grid[0] // stride[0]) * -(-grid[1] // stride[1])
    if not 0 <= num_removed <= most:
        raise ValueError(f"cannot remove {num_removed} of {length} tokens of a video: {most} can leave; lower `ratio`")
    if num_removed == 0:
        return TokenMap.identity(batch, length, metric_BLC.device)
    with torch.no_grad():
        frames = metric_BLC.detach().reshape(batch * num_frames, size, channels)
        inside, nearest = (x.view(batch, num_frames, size) for x in nearest_in_tiles(frames, grid, tile, stride))
        token_L = torch.arange(length, device=metric_BLC.device)
        nearest_BL = nearest.flatten(1) + (token_L - token_L % size)
        unit = F.normalize(frames.to(torch.promote_types(frames.dtype, torch.float32)), dim=-1)
        unit = unit.view(batch, num_frames, size, channels)
        before = (unit[:, 1:] * unit[:, :-1]).sum(-1).nan_to_num(nan=-2.0)
        before = F.pad(before, (0, 0, 1, 0), value=-torch.inf)
        similarity_BL = torch.maximum(inside, before).flatten(1)
        # Rounding must not prefer a neighbour in space to the very same token in time.
        is_before = before >= inside - 1e-6
        target_BL = torch.where(is_before.flatten(1), token_L - size, nearest_BL)
        target_BL = torch.where(leaving(similarity_BL, num_removed, penalty_BL), target_BL, token_L)
        # Each step follows twice as many links of a chain: one in space and one in time for each frame at most.
        for _ in range((2 * num_frames - 1).bit_length()):
            target_BL = target_BL.gather(1, target_BL)
        return TokenMap.from_destinations(target_BL, length - num_removed)
