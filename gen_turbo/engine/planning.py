"""From the tokens of one call to a plan: one row per sample, per frame, or one for the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.engine.call import Call
from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.frames import one_sequence
from gen_turbo.tokens.token_map import TokenMap

Semantic = Callable[[Tensor, str], Tensor | None]
"""Gives the semantic value of tokens (B, N, C) by kind as (B, N)."""


def plan_call(
    reducer: TokenReducer, call: Call, name: str, ratio: float, frame: StepInfo, semantic: Semantic
) -> TokenMap:
    """Plans the reduction of the image tokens of a call.

    Under guidance the batch repeats its pictures: the second rows, which are conditional, plan for all. Where positions
    have no batch axis, one plan serves all samples, by the mean of their similarities. Frames of a video are planned
    one by one.
    """
    tokens = call.tokens
    num = call.observation.num_pictures
    rows = tokens[num : 2 * num] if 0 < num < len(tokens) and len(tokens) % num == 0 else tokens
    shares = call.form.shares_plan and len(rows) > 1
    metric = _side_by_side(rows) if shares else rows
    num_frames = call.num_frames if call.grid else 1

    def value(kind: str) -> Tensor | None:
        found = semantic(rows, kind)
        if found is None:
            return None
        found = found.mean(0, keepdim=True) if shares else found
        return found.reshape(len(found) * num_frames, -1)

    site = LayerInfo(name, ratio, call.grid, semantic=value)
    plan = reducer.plan(metric.reshape(len(metric) * num_frames, -1, metric.shape[2]), site, frame)
    return one_sequence(plan, num_frames) if num_frames > 1 else plan


def _side_by_side(rows: Tensor) -> Tensor:
    """Joins samples (B, N, C) to (1, N, B * C) so that a cosine is the mean of the samples' cosines."""
    unit = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    return unit.permute(1, 0, 2).reshape(1, rows.shape[1], -1)
