"""Plans of the frames of a video as one plan of the whole sequence."""

from __future__ import annotations

import torch

from gen_turbo.core.plan import ReductionPlan


def one_sequence(plan: ReductionPlan, num_frames: int) -> ReductionPlan:
    """Joins one plan row per frame into one row per video: tokens in frame order, no slot across frames.

    Args:
        plan: One row per frame, frames of a video side by side: (B * num_frames, N).
        num_frames: Frames of a video.

    Returns:
        A plan of B rows with `num_frames * N` tokens.

    Raises:
        ValueError: If the rows are no multiple of `num_frames`.
    """
    if len(plan.slot_BN) % num_frames:
        raise ValueError(f"{len(plan.slot_BN)} plan rows are no multiple of {num_frames} frames; plan every frame")
    frame = torch.arange(num_frames, device=plan.slot_BN.device)[None, :, None]
    slot = plan.slot_BN.view(-1, num_frames, plan.num_tokens) + frame * plan.num_slots
    anchor = plan.anchor_BM.view(-1, num_frames, plan.num_slots) + frame * plan.num_tokens
    return ReductionPlan(slot.flatten(1), anchor.flatten(1))
