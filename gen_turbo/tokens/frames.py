"""Plans of the parts of a sequence as one plan of the whole: the frames of a video, images beside each other."""

from __future__ import annotations

from collections.abc import Sequence

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


def side_by_side(plans: Sequence[TokenMap]) -> TokenMap:
    """Joins the plans of parts that follow each other in a sequence; no slot reaches from one part into another.

    Args:
        plans: One for each part, (B, n) tokens or (1, n), which serves every row.

    Returns:
        A plan of B rows on all tokens.
    """
    rows = max(len(plan.slot_BN) for plan in plans)
    slots, anchors, num_tokens, num_slots = [], [], 0, 0
    for plan in plans:
        repeats = rows // len(plan.slot_BN)
        slots.append(plan.slot_BN.repeat(repeats, 1) + num_slots)
        anchors.append(plan.anchor_BM.repeat(repeats, 1) + num_tokens)
        num_tokens, num_slots = num_tokens + plan.num_tokens, num_slots + plan.num_slots
    return TokenMap(torch.cat(slots, 1), torch.cat(anchors, 1))
