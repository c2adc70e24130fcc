"""Vision towers: tokens merge between self-attention and MLP of every block, and are restored where code needs them.

Shape names: B pictures, N tokens of the tower (class tokens first), P of them patches, M slots, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.score import attention_column_mean
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.columns import protect_leading
from gen_turbo.vlm.family import TowerFacts, square
from gen_turbo.vlm.projections import Projections

_MOST_QUERIES = 256


@dataclass
class _Pass:
    """One call of the tower: the tokens it has now, as a plan on those it began with."""

    num_patches: int = 0
    batch: int = 0
    total: TokenMap | None = None
    by_block: dict[int, TokenMap] = field(default_factory=dict)
    totals: dict[int, TokenMap] = field(default_factory=dict)


class Tower:
    """The hooks on one vision tower.

    Merging happens where the norm between attention and MLP is entered: the MLP runs on slots, its output is copied
    back to the tokens that the block's own sum still has, and what leaves the block is merged by the same plan. For
    a weighted mean that equals merging in between, and needs no block of our own.

    Attributes:
        reducer: Plans each block's merge; None only watches.
        patches: The plan of the whole tower on its patches in the last call, (pictures, patches); None without one.
        last: What the last used block of the last call knows, for the semantic value of patches.
    """

    def __init__(self, model: nn.Module, facts: TowerFacts, reducer: TokenReducer | None) -> None:
        self.facts, self.reducer = facts, reducer
        self.module = model.get_submodule(facts.module)
        self.encoder = self.module.get_submodule(facts.encoder) if facts.encoder else self.module
        self.blocks: list[nn.Module] = list(getattr(self.encoder, facts.blocks))
        self.num_leading = facts.num_leading(model)
        self.last_block = facts.last_block(model) % len(self.blocks)
        self.patches: TokenMap | None = None
        self.on_block: Callable[[int, int, int], None] = lambda block, before, after: None
        self._pass = _Pass()
        self._projections = [Projections(getattr(block, facts.attention), facts) for block in self.blocks]

    @property
    def watched(self) -> list[int]:
        """Blocks whose queries and keys are seen: those that merge, else the last one in use."""
        return list(range(self.last_block + 1)) if self.reducer is not None else [self.last_block]

    def install(self) -> list[Any]:
        """Puts the hooks in place and gives back what takes them off, each with a method `remove`."""
        handles: list[Any] = [
            self.module.register_forward_pre_hook(lambda module, args: self._begin()),
            self.encoder.register_forward_hook(self._after_encoder),
            self.module.register_forward_hook(self._after_tower),
        ]
        for index in self.watched if self.reducer is None else range(len(self.blocks)):
            handles += self._projections[index].install()
        if self.reducer is None:
            return handles
        for index in range(len(self.blocks)):
            block = self.blocks[index]
            handles.append(block.register_forward_pre_hook(self._before_block(index), with_kwargs=True))
            if index <= self.last_block:
                norm2 = getattr(block, self.facts.norm2)
                handles.append(norm2.register_forward_pre_hook(self._before_norm2(index)))
                handles.append(block.mlp.register_forward_hook(self._after_mlp(index)))  # type: ignore[union-attr]
        return handles

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
        query, key = self._projections[index].query_key()
        log_size = self._log_size(index)
        if kind == "class":
            return attention_column_mean(query[:, :, :1], key, log_size)
        stride = max(1, query.shape[2] // _MOST_QUERIES)
        return attention_column_mean(query[:, :, ::stride], key, log_size)

    def plans(self) -> list[TokenMap]:
        """The plan of the whole tower on the patches of each picture of the last call; empty where none merged."""
        return self.patches.by_row() if self.patches is not None else []

    def values(self, kind: str) -> list[Tensor] | None:
        """The semantic value of the patches of each picture in the last block in use, as `value` gives it."""
        value = self.value(kind)
        return list(value[:, self.num_leading :]) if value is not None else None

    def _begin(self) -> None:
        self._pass, self.patches = _Pass(), None

    def _log_size(self, index: int) -> Tensor | None:
        """Logarithm of how many tokens each token of a block's attention stands for; None if all stand for one."""
        before = self._pass.totals.get(index - 1)
        return before.sizes().log() if before is not None else None

    def _before_block(self, index: int) -> Any:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._pass.batch, self._pass.num_patches = len(hidden), self._pass.num_patches or hidden.shape[1]
            if index > self.last_block:
                self._keep(index, self._pass.total)
            merged = self._merged(index - 1, hidden)
            self._projections[index].weigh(self._log_size(index))
            if merged is hidden:
                return None
            return (merged, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return before

    def _merged(self, index: int, y: Tensor) -> Tensor:
        """What leaves a block, merged by the block's plan; its weights are the sizes before the block."""
        plan = self._pass.by_block.get(index)
        if plan is None or y.shape[1] != plan.num_tokens:
            return y
        before = self._pass.totals.get(index - 1)
        return plan.merge(y, weight=before.sizes().to(y.dtype) if before is not None else None)

    def _before_norm2(self, index: int) -> Any:
        def before(norm: nn.Module, args: tuple[Any, ...]) -> Any:
            plan = self._plan(index, args[0])
            if plan is None:
                return None
            self._pass.by_block[index] = plan
            return (self._merged(index, args[0]),)

        return before

    def _after_mlp(self, index: int) -> Any:
        def after(mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            plan = self._pass.by_block.get(index)
            return plan.unmerge(output) if plan is not None else None

        return after

    def _plan(self, index: int, hidden: Tensor) -> TokenMap | None:
        """Plans one block's merge on the mean of the keys over heads, class tokens apart, and joins it to the rest."""
        assert self.reducer is not None
        leading, total = self.num_leading, self._pass.total
        _, key = self._projections[index].query_key()
        metric = key.mean(1)[:, leading:]
        num_patches = metric.shape[1]
        start = self._pass.num_patches - leading
        ratio = block_ratio(start, num_patches, self.reducer.ratio, index, self.last_block + 1)
        site = LayerInfo(
            f"{self.facts.module}.{index}",
            ratio,
            square(num_patches) if total is None else None,
            semantic=lambda kind: _patches(self.value(kind, index), leading),
        )
        plan = self.reducer.plan(metric, site, StepInfo(num_plans=index))
        self.on_block(index, num_patches, plan.num_slots)
        if plan.is_identity:
            self._keep(index, total)
            return None
        rows = len(metric) if len(plan.slot_BN) == 1 else 1
        slot, anchor = plan.slot_BN.repeat(rows, 1), plan.anchor_BM.repeat(rows, 1)
        plan = TokenMap(protect_leading(slot, leading), protect_leading(anchor, leading))
        self._keep(index, plan if total is None else total.then(plan))
        return plan

    def _keep(self, index: int, total: TokenMap | None) -> None:
        self._pass.total = total
        if total is not None:
            self._pass.totals[index] = total

    def _restored(self, index: int, y: Tensor) -> Tensor:
        """What leaves a block as the rest of the model wants it."""
        merged = self._merged(index, y)
        total = self._pass.totals.get(index)
        # The last of the recorded states may be the output of the tower, restored already.
        if total is None or merged.shape[1] != total.num_slots or not self.facts.is_restored:
            return merged
        return total.unmerge(merged)

    def _after_encoder(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.reducer is not None and self._pass.total is not None:
            index = len(self.blocks) - 1
            self._pass.totals.setdefault(index, self._pass.total)
            output.last_hidden_state = self._restored(index, output.last_hidden_state)
        return output

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.reducer is None or self._pass.total is None:
            return output
        states = getattr(output, "hidden_states", None)
        if states is not None and self.facts.is_restored:
            totals = self._pass.totals
            output.hidden_states = tuple(
                state if state is None or (index - 1) not in totals else self._restored(index - 1, state)
                for index, state in enumerate(states)
            )
        total = self._pass.total
        leading = self.num_leading
        self.patches = TokenMap(total.slot_BN[:, leading:] - leading, total.anchor_BM[:, leading:] - leading)
        return output


def block_ratio(start: int, num_now: int, ratio: float, index: int, num_blocks: int) -> float:
    """A block's share: the same number leaves in every block, so that the whole ratio has left after the last.

    Args:
        start: Tokens of one picture that entered the tower.
        num_now: Those that enter this block.
        ratio: The fraction that is to leave in the whole tower.
        index: This block.
        num_blocks: Blocks that merge.
    """
    target = num_removed(start, ratio) * (index + 1) // num_blocks
    leaving = target - (start - num_now)
    # Half a token more, so that rounding down gives exactly this number.
    return max(0.0, min((leaving + 0.5) / num_now, 1.0)) if leaving > 0 else 0.0


def _patches(value_BN: Tensor | None, leading: int) -> Tensor | None:
    return value_BN[:, leading:] if value_BN is not None else None
