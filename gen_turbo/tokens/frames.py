"""Plans of the frames of a video as one plan of the whole sequence."""

from __future__ import annotations

import torch

from gen_turbo.tokens.token_map import TokenMap


def one_sequence(plan: TokenMap, num_frames: int) -> TokenMap:
    """Joins one plan row per frame into one row per video: tokens in frame order, no slot across frames.

    Args:
        plan: One row per frame, frames of a video side by side: (B * num_frames, N). One row serves every frame.
        num_frames: Frames of a video.

    Returns:
        A plan of B rows with `num_frames * N` tokens.

    Raises:
        ValueError: If the rows are no multiple of `num_frames`.
    """
    rows = len(plan.slot_BN)
    if rows % num_frames and rows != 1:
        raise ValueError(f"{rows} plan rows are no multiple of {num_frames} frames; plan every frame")
    frame = torch.arange(num_frames, device=plan.slot_BN.device)[None, :, None]
    shape = (1, 1) if rows == 1 else (rows // num_frames, num_frames)
    slot = plan.slot_BN.view(*shape, plan.num_tokens) + frame * plan.num_slots
    anchor = plan.anchor_BM.view(*shape, plan.num_slots) + frame * plan.num_tokens
    return TokenMap(slot.flatten(1), anchor.flatten(1))
