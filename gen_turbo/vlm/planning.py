"""Plans of any method for any number of tokens, at the places where a method works.

Shape names: B images, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.images import Group, Semantic
from gen_turbo.vlm.settings import Staged, placement_of

_CLASSES = 4
"""How many different budgets the images of one call may have, each planned at once."""


def plan_tokens(reducer: TokenReducer, tokens_BNC: Tensor, site: LayerInfo, step: StepInfo) -> TokenMap:
    """Plans as the method does, and on merged tokens again until the site's ratio is reached.

    Raises:
        ValueError: If the method cannot remove any token where more are to leave.
    """
    most = reducer.max_ratio_at(site)
    if site.ratio <= most:
        return reducer.plan(tokens_BNC, site, step)
    batch, length, _ = tokens_BNC.shape
    left = length - num_removed(length, site.ratio)
    total = TokenMap.identity(batch, length, tokens_BNC.device)
    while total.num_slots > left:
        num_now = total.num_slots
        leaving = min(num_now - left, num_removed(num_now, most))
        if leaving == 0:
            raise ValueError(f"{left} of {length} tokens is fewer than this method can keep; raise keep or lower ratio")
        ratio = min((leaving + 0.5) / num_now, most)
        here = replace(site, ratio=ratio, semantic=_merged(site, total))
        if not total.is_identity:
            here = replace(here, grid=None, num_frames=1)
        total = total.then(reducer.plan(total.merge(tokens_BNC), here, step))
        most = reducer.max_ratio
    return total


def _merged(site: LayerInfo, total: TokenMap) -> Callable[[str], Tensor | None] | None:
    """The semantic value of merged tokens, the mean of theirs."""
    if site.semantic is None or total.is_identity:
        return site.semantic

    def semantic(kind: str) -> Tensor | None:
        assert site.semantic is not None
        value = site.semantic(kind)
        return None if value is None else total.merge(value)

    return semantic


class Schedule:
    """From which decoder layers on image tokens leave by a method, and how many.

    Attributes:
        reducer: The method.
        firsts: The first layers without the tokens that leave, ascending; 0 is before the language model.

    Args:
        reducer: The method.
        depth: Decoder layers.
    """

    def __init__(self, reducer: TokenReducer, depth: int) -> None:
        placement = placement_of(reducer)
        self.reducer, self._depth = reducer, depth
        self.firsts = [placement.layer if placement.place == "decoder" else 0]
        if isinstance(reducer, Staged):
            self.firsts = list(reducer.stages(depth, 1))

    def removes(self, length: int) -> bool:
        """Whether some tokens of an image of so many leave at any layer."""
        if isinstance(self.reducer, Staged):
            return min(self.reducer.stages(self._depth, length).values()) < length
        return num_removed(length, self.reducer.ratio_of(length)) > 0

    def plan(self, first: int, tokens_BNC: Tensor, group: Group, semantic: Semantic) -> TokenMap:
        """Plans for the tokens of images of one size before a layer."""
        if isinstance(self.reducer, Staged):
            ratio = group.ratio_to(self.reducer.stages(self._depth, group.whole or group.length)[first])
        else:
            ratio = group.ratio(self.reducer)
        site = LayerInfo("decoder" if first else "pre_llm", ratio, group.grid, semantic, group.num_frames)
        return plan_tokens(self.reducer, tokens_BNC, site, StepInfo())


def plan_copies(tokens_BNC: Tensor, group: Group) -> TokenMap:
    """The plan by which the tower made tokens equal; nothing is removed where features are no longer patches."""
    plans = group.plans()
    if not plans:
        return TokenMap.identity(1, group.length, tokens_BNC.device)
    slot, anchor = ([getattr(plan, name) for plan in plans] for name in ("slot_BN", "anchor_BM"))
    return TokenMap(torch.cat(slot), torch.cat(anchor))


@torch.no_grad()
def shared_budgets(tokens_BNC: Tensor, kept: int) -> list[tuple[int, Tensor]]:
    """Shares a budget among images by how much they show: as many tokens in all as `kept` each.

    An image shows as much as its tokens differ: the participation ratio of their covariance, `tr(G)^2 / tr(G^2)`,
    which counts the directions that they fill. Shares grow with its square root, between a half and twice the mean,
    and images of like share have one budget, so that few plans serve a batch of any size.

    Args:
        tokens_BNC: Tokens of images of one size.
        kept: The mean budget.

    Returns:
        Budgets and the rows that have them, of at most four different numbers.
    """
    batch, length, _ = tokens_BNC.shape
    # What is no number shows nothing.
    x = tokens_BNC.float().nan_to_num(0.0, 0.0, 0.0)
    x = x - x.mean(1, keepdim=True)
    gram = x.transpose(1, 2) @ x if x.shape[2] < length else x @ x.transpose(1, 2)
    filled = gram.diagonal(dim1=1, dim2=2).sum(1).square() / gram.square().sum((1, 2)).clamp_min(1e-30)
    share = filled.sqrt()
    share = (share / share.mean()).clamp(0.5, 2.0)
    order = share.argsort()
    budgets = []
    for rows in order.tensor_split(min(_CLASSES, batch)):
        budgets.append((float(share[rows].mean()), rows))
    scale = kept * batch / sum(mean * len(rows) for mean, rows in budgets)
    found, spent = [], 0
    for index, (mean, rows) in enumerate(budgets):
        number = round(mean * scale)
        if index == len(budgets) - 1:
            # What rounding left over goes to those that show most.
            number = (kept * batch - spent) // len(rows)
        number = max(1, min(length, number))
        spent += number * len(rows)
        found.append((number, rows))
    return found
