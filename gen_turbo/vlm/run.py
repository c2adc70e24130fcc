"""What is known during one call of a vision-language model: where its image tokens are, and of which image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gen_turbo.method import Grid, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.planning import shared_budgets

FRAME = -1
"""The origin of a frame of a video."""
Planner = Callable[[Tensor, "Group"], TokenMap]
"""Plans for tokens (K, n, C) of K images of one size."""


@dataclass(frozen=True)
class Group:
    """Images of one call that have the same number of tokens and the same grid, and are planned together.

    Attributes:
        images: Which images.
        length: Tokens of each.
        grid: (height, width) of each, where there is one.
        kept: How many tokens of each stay, where images share a budget.
        whole: Tokens of each before any left, where some have left earlier; 0 where none has.
    """

    images: list[int]
    length: int
    grid: Grid | None
    kept: int | None = None
    whole: int = 0

    def ratio(self, reducer: TokenReducer) -> float:
        """The fraction that is removed: what is to be kept of these images, else what the method says."""
        return reducer.ratio_of(self.length) if self.kept is None else self.ratio_to(self.kept)

    def ratio_to(self, kept: int) -> float:
        """The fraction that is removed where so many stay."""
        # Half a token more, so that rounding down removes exactly the number.
        return max(0.0, 1 - (kept - 0.5) / self.length)


@dataclass
class Images:
    """The image tokens of one call.

    Attributes:
        is_image_BL: Which columns are image tokens.
        lengths: Tokens of each image, in the order of the flattened mask.
        grids: (height, width) of each image, where there is one.
        origins: Which of the images that the tower saw last each one is; None for one that it did not see, `FRAME` for
            a frame of a video, of which nothing else is known.
        wholes: Tokens of each image before any left; empty where none has.
        num_columns: Columns of the call before any left; 0 where none has.
    """

    is_image_BL: Tensor
    lengths: list[int]
    grids: list[Grid | None]
    origins: list[int | None] = field(default_factory=list)
    wholes: list[int] = field(default_factory=list)
    num_columns: int = 0
    _places: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    def groups(self) -> list[Group]:
        """The images by size."""
        found: dict[tuple[Any, ...], list[int]] = {}
        count = len(self.lengths)
        frames = [origin == FRAME for origin in self.origins or [None] * count]
        keys = zip(self.lengths, self.grids, self.wholes or [0] * count, frames, strict=True)
        for image, key in enumerate(keys):
            found.setdefault(key, []).append(image)
        return [Group(images, length, grid, whole=whole) for (length, grid, whole, _), images in found.items()]

    def shortened(self, here: Columns, reduction: Reduction) -> Images:
        """The images in the columns that stay after a reduction."""
        lengths = reduction.lengths()
        grids: list[Grid | None] = self.grids if lengths == self.lengths else [None] * len(lengths)
        before = self.wholes or self.lengths, self.num_columns or self.is_image_BL.numel()
        return Images(here.mask(self.is_image_BL), lengths, grids, self.origins, *before)

    def index(self, group: Group) -> Tensor:
        """Places of a group's tokens among all image tokens: (K, n)."""
        images = tuple(group.images)
        if images not in self._places:
            starts = [0, *accumulate(self.lengths)]
            first = torch.tensor([starts[image] for image in images], device=self.is_image_BL.device)
            self._places[images] = first[:, None] + torch.arange(group.length, device=first.device)
        return self._places[images]


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
        is_image = self.images.is_image_BL
        tokens = x_BLC[is_image]
        for group, plan in self.plans:
            index = self.images.index(group)
            tokens = tokens.index_put((index.gather(1, _rows(plan.anchor_BM, index)),), plan.merge(tokens[index]))
        merged = x_BLC.masked_scatter(is_image[..., None], tokens)
        for one in self.words:
            merged[one.row, one.anchors] = one.plan.merge(x_BLC[one.row, one.places][None])[0]
        return merged

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
    tokens = x_BLC[images.is_image_BL]
    stays = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    plans = []
    for group in images.groups():
        if group.length == 1:
            # Nothing can leave, as of the newline behind a video.
            plans.append((group, TokenMap.identity(1, 1, tokens.device)))
            continue
        parts = [group] if shared is None else _shared(group, tokens[images.index(group)], shared)
        for part in parts:
            plans.append((part, planner(tokens[images.index(part)], part)))
    for group, plan in plans:
        index = images.index(group)
        stays[index.gather(1, _rows(plan.anchor_BM, index))] = True
    keep = ~images.is_image_BL
    return Reduction(images, plans, keep.masked_scatter(images.is_image_BL, stays))


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
    return [replace(group, images=[group.images[row] for row in chosen], kept=number) for number, chosen in budgets]


def _rows(anchor_BM: Tensor, index: Tensor) -> Tensor:
    """A plan of one row serves every image."""
    return anchor_BM.expand(len(index), -1) if len(anchor_BM) == 1 else anchor_BM
