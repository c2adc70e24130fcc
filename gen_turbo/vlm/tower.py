"""Vision towers: tokens merge between self-attention and MLP of blocks, and are restored where code needs them.

Shape names: B images, N tokens of the tower (class tokens first), P of them patches, M slots, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.call import CallState, begin_anew
from gen_turbo.vlm.family import TowerFacts, square
from gen_turbo.vlm.merging import Merging
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.projections import Projections

EARLY = "early "
"""What the kinds of semantic value in the early block begin with."""


@dataclass
class _Pass:
    """One call of the tower.

    Attributes:
        num_tokens: Tokens of an image that entered the first block, class tokens included.
        by_block: Each block's merge of the tokens that entered it.
        totals: The tokens after each block, as a merge of those that the call began with; none before the first.
    """

    num_tokens: int = 0
    by_block: dict[int, Merging] = field(default_factory=dict)
    totals: dict[int, Merging] = field(default_factory=dict)


class Tower:
    """The hooks on one vision tower.

    Merging happens where the norm between attention and MLP is entered: the MLP runs on slots, its output is copied
    back to the tokens that the block's own sum still has, and the block's output is merged by the same plan. For
    a weighted mean that equals merging in between, and needs no block of our own.

    Attributes:
        reducer: Plans each block's merge; None only watches.
        num_blocks: Blocks in use.
        patches: The plan of the whole tower on its patches in the last call, (images, patches); None without one.
        early: A block before the last whose attention is asked for as well; None if there is none.
        is_video: Says whether the tower is given frames of a video now, which pass as they are.
    """

    patches: CallState[TokenMap | None] = CallState(lambda: None)
    _pass: CallState[_Pass] = CallState(_Pass)

    def __init__(self, model: nn.Module, facts: TowerFacts, reducer: TokenReducer | None) -> None:
        self.facts, self.reducer = facts, reducer
        self.module = model.get_submodule(facts.module)
        self.encoder = self.module.get_submodule(facts.encoder) if facts.encoder else self.module
        self.blocks: list[nn.Module] = list(getattr(self.encoder, facts.blocks))
        self.num_leading = facts.num_leading(model)
        self.last_block = facts.last_block(model) % len(self.blocks)
        self.num_blocks = self.last_block + 1
        self.early: int | None = None
        self.is_video: Callable[[], bool] = lambda: False
        self.on_block: Callable[[int, int, int], None] = lambda block, before, after: None
        self._projections = [Projections(getattr(block, facts.attention), facts) for block in self.blocks]

    @property
    def watched(self) -> list[int]:
        """Blocks whose queries and keys are seen."""
        return watched_blocks(self.reducer, self.num_blocks, self.early)

    def install(self) -> Iterator[Any]:
        """Puts the hooks in place, one after the other, and gives what takes each off, with a method `remove`."""
        watched = self.watched
        for index in watched:
            yield from self._projections[index].watch()
        if self.reducer is None:
            return
        yield self.module.register_forward_pre_hook(lambda module, args: self._begin())
        yield self.encoder.register_forward_hook(self._after_encoder)
        yield self.module.register_forward_hook(self._after_tower)
        for index, block in enumerate(self.blocks):
            yield self._projections[index].weigh(self._log_size(index))
            yield block.register_forward_pre_hook(self._before_block(index), with_kwargs=True)
            if index in watched:
                norm2 = getattr(block, self.facts.norm2)
                yield norm2.register_forward_pre_hook(self._before_norm2(index))
                yield block.mlp.register_forward_hook(self._after_mlp(index))  # type: ignore[union-attr]

    def value(self, kind: str, index: int | None = None) -> Tensor | None:
        """The semantic value of the tokens that reach a block, class tokens included.

        Args:
            kind: "class" for the attention of the class token, "self" for the column mean of attention.
            index: The block; the last one in use by default.

        Returns:
            (B, N), every row summing to one; None where there is no class token, or no such kind.
        """
        index = self.last_block if index is None else index
        if kind not in ("class", "self") or (kind == "class" and not self.num_leading):
            return None
        log_size, projections = self._log_size(index)(), self._projections[index]
        return projections.class_attention(log_size) if kind == "class" else projections.received(log_size)

    def plans(self) -> list[TokenMap]:
        """The plan of the whole tower on the patches of each image of the last call; empty where none merged."""
        return self.patches.by_row() if self.patches is not None else []

    def values(self, kind: str) -> list[Tensor] | None:
        """The semantic value of the patches of each image in the last block in use, as `value` gives it.

        Args:
            kind: As `value` knows it; behind "early ", that of the early block.
        """
        value = self.value(kind.removeprefix(EARLY), self.early if kind.startswith(EARLY) else None)
        return list(value[:, self.num_leading :]) if value is not None else None

    def _begin(self) -> None:
        begin_anew(self)
        self._pass = _Pass()

    def _log_size(self, index: int) -> Callable[[], Tensor | None]:
        """Gives the logarithm of how many tokens each token of a block's attention stands for; None if all are one."""

        def log_size() -> Tensor | None:
            before = self._pass.totals.get(index - 1)
            return before.log_sizes if before is not None else None

        return log_size

    def _before_block(self, index: int) -> Any:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now = self._pass
            hidden = args[0] if args else kwargs["hidden_states"]
            now.num_tokens = now.num_tokens or hidden.shape[1]
            if index - 1 in now.totals:
                # Stays where this block merges nothing.
                now.totals[index] = now.totals[index - 1]
            merged = self._merged(index - 1, hidden)
            if merged is hidden:
                return None
            return (merged, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return before

    def _merged(self, index: int, y: Tensor) -> Tensor:
        """A block's output, merged by the block's plan; its weights are the sizes before the block."""
        merging = self._pass.by_block.get(index)
        return y if merging is None or y.shape[1] != merging.num_tokens else merging.merge(y)

    def _before_norm2(self, index: int) -> Any:
        def before(norm: nn.Module, args: tuple[Any, ...]) -> Any:
            now, merging = self._pass, None if self.is_video() else self._plan(index)
            if merging is None:
                return None
            earlier = now.totals.get(index - 1)
            now.by_block[index] = merging
            now.totals[index] = merging if earlier is None else earlier.then(merging)
            return (merging.merge(args[0]),)

        return before

    def _after_mlp(self, index: int) -> Any:
        def after(mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            merging = self._pass.by_block.get(index)
            return merging.unmerge(output) if merging is not None else None

        return after

    def _plan(self, index: int) -> Merging | None:
        """Plans one block's merge on the mean of the keys over heads, class tokens apart."""
        assert self.reducer is not None
        now, leading, merging = self._pass, self.num_leading, self.watched
        metric = self._projections[index].mean_key()[:, leading:]
        num_patches, total = metric.shape[1], now.totals.get(index - 1)
        start = now.num_tokens - leading
        site = LayerInfo(
            f"{self.facts.module}.{index}",
            block_ratio(start, num_patches, self.reducer.ratio_of(start), merging.index(index), len(merging)),
            square(num_patches) if total is None else None,
            semantic=lambda kind: _patches(self.value(kind, index), leading),
        )
        plan = plan_tokens(self.reducer, metric, site, StepInfo(num_plans=index))
        self.on_block(index, num_patches, plan.num_slots)
        if plan.is_identity:
            return None
        return Merging.of(plan, len(metric), leading, total.sizes if total is not None else None)

    def _restored(self, index: int, y: Tensor) -> Tensor:
        """A block's output as the rest of the model wants it."""
        merged = self._merged(index, y)
        total = self._pass.totals.get(index)
        # The last of the recorded states may be the output of the tower, restored already.
        if total is None or merged.shape[1] != total.num_slots or not self.facts.is_restored:
            return merged
        return total.unmerge(merged)

    def _after_encoder(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._pass.totals:
            output.last_hidden_state = self._restored(len(self.blocks) - 1, output.last_hidden_state)
        return output

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        totals = self._pass.totals
        if not totals:
            return output
        states = getattr(output, "hidden_states", None)
        if states is not None and self.facts.is_restored:
            output.hidden_states = tuple(
                state if state is None or (index - 1) not in totals else self._restored(index - 1, state)
                for index, state in enumerate(states)
            )
        self.patches = totals[max(totals)].plan(self.num_leading)
        return output


def watched_blocks(reducer: TokenReducer | None, num_blocks: int, early: int | None) -> list[int]:
    """Blocks whose queries and keys are seen: those that merge, else the last one in use and an early one."""
    if reducer is not None:
        return merging_blocks(reducer, num_blocks)
    return sorted({num_blocks - 1} | ({early} if early is not None else set()))


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


def _patches(value_BN: Tensor | None, leading: int) -> Tensor | None:
    return value_BN[:, leading:] if value_BN is not None else None
