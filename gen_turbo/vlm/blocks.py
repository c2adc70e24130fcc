"""What the stages on vision towers share: which blocks merge, where in a block, and what is kept of the images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gen_turbo.method import TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.counts import Counts
from gen_turbo.vlm.family import TowerFacts
from gen_turbo.vlm.images import Encoded
from gen_turbo.vlm.merging import Merging
from gen_turbo.vlm.recomputed import Recomputed
from gen_turbo.vlm.stage import Encoder, Handle
from gen_turbo.vlm.videos import Videos

EARLY = "early "
"""What the kinds of semantic value in the early block begin with."""


@dataclass
class Pass:
    """One call of a tower.

    Attributes:
        by_block: Each block's merge of the tokens that entered it; None where it merges none.
        totals: The tokens after each block, as a merge of those that the call began with; none before the first.
        counted: Each merge, counted once the tower has run: its name, and the tokens before and after.
    """

    by_block: dict[int, Merging | None] = field(default_factory=dict)
    totals: dict[int, Merging] = field(default_factory=dict)
    counted: list[tuple[str, int, int]] = field(default_factory=list)

    def note(self, index: int, merging: Merging | None) -> None:
        """Adds the merge of a block."""
        earlier = self.totals.get(index - 1)
        self.by_block[index] = merging
        if merging is not None:
            self.totals[index] = merging if earlier is None else earlier.then(merging)


P = TypeVar("P", bound=Pass)


class TowerStage(Encoder, Generic[P]):
    """A vision tower of pre-norm blocks.

    Merging happens where the norm between attention and MLP is entered: the MLP runs on slots, its output is copied
    back to the tokens that the block's own sum still has, and the block's output is merged by the same plan. For
    a weighted mean that equals merging in between, and needs no block of our own.

    Args:
        model: The model.
        facts: What is known of its tower.
        counts: Receives the rows of blocks that merge.
        reducer: Plans each block's merge; None only watches.
        semantic: The semantic value of patches in the last block in use that is kept, "class" for the attention of
            the class token or "self" for the column mean of attention, also where there is no class token; empty: none.
        early: Gives, for a number of blocks, one before the last whose value is kept as well, as "early class" or
            "early self".
        videos: Knows whether the tower is given frames of a video, which pass as they are.
    """

    _make: type[P]
    _hook: type[partial[Any]] = partial
    """What the hooks of blocks are: `Traced` where compiled code has them in its graph."""
    _attention: list[Any]
    """Watches and weighs the attention of each block."""

    def __init__(
        self,
        model: nn.Module,
        facts: TowerFacts,
        counts: Counts,
        reducer: TokenReducer | None = None,
        semantic: str = "",
        early: Callable[[int], int] | None = None,
        videos: Videos | None = None,
    ) -> None:
        super().__init__()
        self._tower: Any = model.get_submodule(facts.module)
        self._encoder: Any = self._tower.get_submodule(facts.encoder)
        self._facts, self._counts, self._reducer, self._videos = facts, counts, reducer, videos
        self._blocks, self._last_block = facts.stack(model)
        self._passes: Calls[P] = Calls(self._make)
        self._semantic, count = semantic, self._last_block + 1
        self._asked = {} if not semantic else {"": self._last_block}
        if semantic and early is not None:
            self._asked[EARLY] = early(count)
        self._recomputed = Recomputed(self._blocks, self._passes)
        self._watched = sorted(self._asked.values()) if reducer is None else merging_blocks(reducer, count)
        for index in self._watched if reducer is not None else ():
            counts.add(self._name(index))

    @abstractmethod
    def _watch(self, index: int) -> Iterator[Handle]:
        """Keeps what a block's attention projects."""

    @abstractmethod
    def _weigh(self, index: int) -> Handle:
        """Weighs the keys of a block's attention by how many tokens each token stands for."""

    @abstractmethod
    def _before_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Has a block run on the slots that the blocks before it left."""

    @abstractmethod
    def _plan(self, now: P, index: int) -> Merging | None:
        """Plans one block's merge; None where nothing is removed."""

    @abstractmethod
    def _plans(self, now: P) -> list[TokenMap]:
        """The plan of the whole tower on the patches of each image; empty where none merged."""

    @abstractmethod
    def _values(self, now: P, kind: str, index: int) -> list[Tensor] | None:
        """The semantic value of the patches of each image in a block; None where there is none of that kind."""

    def _length(self, y: Tensor) -> int:
        """How many tokens a block's input or output has, as its merge counts them."""
        return y.shape[1]

    def _apply(self, verb: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Applies a verb of a merge to a block's input or output."""
        return verb(y)

    def _name(self, index: int) -> str:
        return f"{self._facts.module}.{index}"

    @property
    def _is_video(self) -> bool:
        return self._videos is not None and self._videos.is_encoding

    def _place_blocks(self) -> Iterator[Handle]:
        for index in self._watched:
            yield from self._watch(index)
        if self._reducer is None:
            return
        yield from self._recomputed.place()
        for index, block in enumerate(self._blocks):
            yield self._weigh(index)
            yield block.register_forward_pre_hook(self._hook(self._before_block, index), with_kwargs=True)
            if index in self._watched:
                norm2 = getattr(block, self._facts.norm2)
                yield norm2.register_forward_pre_hook(self._hook(self._before_norm2, index))
                yield block.mlp.register_forward_hook(self._hook(self._after_mlp, index))

    def _before_norm2(self, index: int, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        now = self._passes.now
        # What is computed again for the backward pass merges as before.
        if index not in now.by_block:
            with torch.no_grad():
                now.note(index, None if self._is_video else self._plan(now, index))
        merging = now.by_block[index]
        return None if merging is None else (self._apply(merging.merge, args[0]),)

    def _after_mlp(self, index: int, mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        merging = self._passes.now.by_block.get(index)
        return self._apply(merging.unmerge, output) if merging is not None else None

    def _merged(self, now: P, index: int, y: Tensor) -> Tensor:
        """A block's output, merged by the block's plan; its weights are the sizes before the block."""
        merging = now.by_block.get(index)
        if merging is None or self._length(y) != merging.num_tokens:
            return y
        return self._apply(merging.merge, y)

    def _restored(self, now: P, index: int, y: Tensor) -> Tensor:
        """A block's output as the rest of the model wants it."""
        merged, total = self._merged(now, index, y), now.totals.get(index)
        # The last of the recorded states may be the output of the tower, restored already.
        if total is None or self._length(merged) != total.num_slots or not self._facts.is_restored:
            return merged
        return self._apply(total.unmerge, merged)

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Restores what was recorded, and keeps what is known of the images."""
        now, states = self._passes.now, getattr(output, "hidden_states", None)
        if now.totals and states is not None and self._facts.is_restored:
            output.hidden_states = tuple(
                None if state is None else self._restored(now, index - 1, state) for index, state in enumerate(states)
            )
        for name, before, after in now.counted:
            self._counts.count(name, before, after)
        self._last.value = Encoded(self._plans(now), self._kept_values(now))
        return output

    def _kept_values(self, now: P) -> dict[str, list[Tensor]]:
        """The semantic values that are kept, by kind; where there is none of the kind asked for, "self"."""
        found: dict[str, list[Tensor]] = {}
        for when, index in self._asked.items():
            for kind in dict.fromkeys((self._semantic, "self")):
                value = self._values(now, kind, index)
                if value is not None:
                    found[when + kind] = value
                    break
        return found


def merging_blocks(reducer: TokenReducer, num_blocks: int) -> list[int]:
    """Which of the blocks in use merge: every one where a method says how many leave in each, as published.

    Where a ratio says how many leave in all, at most `num_merges` blocks merge, evenly spaced.
    """
    most: int = getattr(reducer, "num_merges", 8) or num_blocks
    if getattr(reducer, "num_removed", 0) or most >= num_blocks:
        return list(range(num_blocks))
    return [(2 * step + 1) * num_blocks // (2 * most) for step in range(most)]


def block_ratio(start: int, num_now: int, ratio: float, step: int, num_steps: int) -> float:
    """A block's share: the same number is removed in every block that merges, the whole ratio by the end.

    Args:
        start: Tokens of one image that entered the tower.
        num_now: Those that enter this block.
        ratio: The fraction that is to leave in the whole tower.
        step: Which of the blocks that merge this is.
        num_steps: Blocks that merge.
    """
    target = num_removed(start, ratio) * (step + 1) // num_steps
    leaving = target - (start - num_now)
    # Half a token more, so that rounding down gives exactly this number.
    return max(0.0, min((leaving + 0.5) / num_now, 1.0)) if leaving > 0 else 0.0
