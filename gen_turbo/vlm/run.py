"""What is removed from a prompt: plans for the images of one call, and for words, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gen_turbo.method import TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.images import Group, Images
from gen_turbo.vlm.planning import shared_budgets

Planner = Callable[[Tensor, Group], TokenMap]
"""Plans for tokens (K, n, C) of K images of one size."""
Listener = Callable[[int, Images, "Reduction"], None]
"""Receives the first decoder layer without the tokens that left, the images before, and what left."""


@dataclass(frozen=True)
class WordPlan:
    """The plan for the words of one row.

    Attributes:
        row: The row.
        places: The columns of its words.
        plan: One row, on those words.
    """

    row: int
    places: Tensor
    plan: TokenMap

    @property
    def anchors(self) -> Tensor:
        """The columns of the words that stay."""
        return self.places[self.plan.anchor_BM[0]]


@dataclass
class Reduction:
    """Plans for all images of one call, and what follows from them.

    Attributes:
        plans: Each group's plan.
        keep_BL: Columns that stay: text, and the anchor of every slot.
        images: The images as they were.
        words: Plans for words, where some of them leave too.
        num_columns: Columns that run in all, padding to the longest row included; known once the rows are made.
    """

    images: Images
    plans: list[tuple[Group, TokenMap]]
    keep_BL: Tensor
    words: list[WordPlan] = field(default_factory=list)
    num_columns: int = 0

    @property
    def is_identity(self) -> bool:
        """Whether every token stays."""
        return not self.words and all(plan.is_identity for _, plan in self.plans)

    def apply(self, x_BLC: Tensor, is_merged: bool) -> Tensor:
        """Puts the mean of each slot at its anchor, or keeps anchors as they are; no column is removed yet."""
        if not is_merged:
            return x_BLC
        rows = x_BLC.flatten(0, 1).clone()
        for group, plan in self.plans:
            if not plan.is_identity:
                slots = plan.merge(self.images.tokens(x_BLC, group))
                rows.index_copy_(0, self.images.anchors(group, plan), slots.flatten(0, 1))
        merged = rows.view_as(x_BLC)
        for one in self.words:
            merged[one.row, one.anchors] = one.plan.merge(x_BLC[one.row, one.places][None])[0]
        return merged

    def log_sizes(self) -> Tensor:
        """Logarithm of how many tokens the one in each column stands for: (B, L), float32."""
        sizes = torch.ones(self.keep_BL.shape, device=self.keep_BL.device)
        for group, plan in self.plans:
            slots = plan.sizes().to(sizes.dtype).expand(len(group.images), -1)
            sizes.view(-1).index_copy_(0, self.images.anchors(group, plan), slots.flatten())
        for one in self.words:
            sizes[one.row, one.anchors] = one.plan.sizes()[0].to(sizes.dtype)
        return sizes.log()

    def lengths(self) -> list[int]:
        """Tokens that each image keeps."""
        kept = dict.fromkeys(range(len(self.images.lengths)), 0)
        for group, plan in self.plans:
            kept.update(dict.fromkeys(group.images, plan.num_slots))
        return [kept[image] for image in range(len(kept))]


def reduce(images: Images, x_BLC: Tensor, planner: Planner, shared: TokenReducer | None = None) -> Reduction:
    """Plans for the images of one call from its columns (B, L, C), size by size.

    Args:
        images: The images.
        x_BLC: What is planned on.
        planner: Plans for images of one size and budget.
        shared: The method whose budget the images of one size share, or that gives each its own; None gives all
            what the method says.
    """
    plans = []
    for group in images.groups():
        if group.length == 1:
            # Nothing can leave, as of the newline behind a video.
            plans.append((group, pass_all(x_BLC, group)))
            continue
        parts = [group] if shared is None else _shared(group, images.tokens(x_BLC, group), shared)
        for part in parts:
            plans.append((part, planner(images.tokens(x_BLC, part), part)))
    keep = ~images.is_image_BL
    for group, plan in plans:
        keep.view(-1).index_fill_(0, images.anchors(group, plan), True)
    return Reduction(images, plans, keep)


def pass_all(tokens: Tensor, group: Group) -> TokenMap:
    """Plans that every token stays."""
    return TokenMap.identity(1, group.length, tokens.device)


def _shared(group: Group, tokens: Tensor, reducer: TokenReducer) -> list[Group]:
    """The images of a group by the budget that each gets, of its own or of what they share."""
    own = getattr(reducer, "budgets", None)
    if own is not None:
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(own(tokens)):
            rows.setdefault(number, []).append(row)
        budgets = list(rows.items())
    else:
        kept = group.length - num_removed(group.length, reducer.ratio_of(group.length))
        if kept == group.length or len(group.images) == 1:
            return [group]
        budgets = [(number, chosen.tolist()) for number, chosen in shared_budgets(tokens, kept)]
    return [group.with_budget(chosen, number) for number, chosen in budgets]
