"""Vision towers whose images have a row of tokens each, restored where later code needs every patch.

Shape names: B images, N tokens of the tower (class tokens first), P of them patches, M slots, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.blocks import Pass, TowerStage, block_ratio
from gen_turbo.vlm.family import square
from gen_turbo.vlm.hooks import Traced
from gen_turbo.vlm.images import Encoded
from gen_turbo.vlm.merging import Merging
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.projections import Projections
from gen_turbo.vlm.stage import Handle


@dataclass
class _Pass(Pass):
    """One call.

    Attributes:
        num_tokens: Tokens of an image that entered the first block, class tokens included.
    """

    num_tokens: int = 0


class Tower(TowerStage[_Pass]):
    """A vision tower.

    Attributes:
        module: The tower.
        num_leading: Class tokens in front.
    """

    _make, _hook = _Pass, Traced

    def __init__(self, model: nn.Module, *settings: Any, **more: Any) -> None:
        super().__init__(model, *settings, **more)
        self.module, self.num_leading = self._tower, self._facts.num_leading(model)
        self._attention = [Projections(getattr(block, self._facts.attention), self._facts) for block in self._blocks]

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the tower, its blocks and their parts; only those that keep projections where it is watched."""
        yield from self._place_blocks()
        if self._reducer is None:
            return
        yield self.module.register_forward_pre_hook(Traced(self._begin))
        yield self._encoder.register_forward_hook(Traced(self._after_encoder))
        yield self.module.register_forward_hook(self._after_tower)
        yield self.module.register_forward_hook(lambda module, args, output: self._passes.end(), always_call=True)

    def encoded(self) -> Encoded:
        """What is known of the images of the last call, asked of what was projected where the tower is watched."""
        return super().encoded() if self._reducer is not None else Encoded([], self._kept_values(_Pass()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps what was projected as well."""
        with super().aside(), ExitStack() as kept:
            for index in self._watched:
                kept.enter_context(self._attention[index].aside())
            yield

    def _watch(self, index: int) -> Iterator[Handle]:
        watching: Iterator[Handle] = self._attention[index].watch()
        return watching

    def _weigh(self, index: int) -> Handle:
        def bias(dtype: torch.dtype) -> Tensor | None:
            before = self._passes.now.totals.get(index - 1)
            return before.logit_bias(dtype) if before is not None else None

        handle: Handle = self._attention[index].bias(bias)
        return handle

    def _begin(self, tower: nn.Module, args: tuple[Any, ...]) -> None:
        self._recomputed.check()
        self._passes.begin()

    def _before_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._passes.now
        hidden = args[0] if args else kwargs["hidden_states"]
        now.num_tokens = now.num_tokens or hidden.shape[1]
        if index - 1 in now.totals:
            # Stays where this block merges nothing.
            now.totals[index] = now.totals[index - 1]
        merged = self._merged(now, index - 1, hidden)
        if merged is hidden:
            return None
        return (merged, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def _plan(self, now: _Pass, index: int) -> Merging | None:
        """Plans one block's merge on the mean of the keys over heads, class tokens apart."""
        assert self._reducer is not None
        merging, total = self._watched, now.totals.get(index - 1)
        start = now.num_tokens - self.num_leading
        num_now = start if total is None else total.num_slots - self.num_leading
        planned = self.num_leading if self._reducer.plans_leading else 0
        apart = self.num_leading - planned

        def semantic(kind: str) -> Tensor | None:
            value = self._value(now, kind, index)
            return None if value is None else _behind(value, apart)

        site = LayerInfo(
            self._name(index),
            block_ratio(start, num_now, self._reducer.ratio_of(start), merging.index(index), len(merging)),
            square(num_now) if total is None else None,
            semantic=semantic,
            num_leading=planned,
        )
        metric = self._attention[index].mean_key()
        plan = plan_tokens(self._reducer, _behind(metric, apart), site, StepInfo(num_plans=index))
        now.counted.append((site.name, num_now, plan.num_slots - planned))
        if plan.is_identity:
            return None
        return Merging.of(plan, len(metric), apart, total.sizes if total is not None else None)

    def _plans(self, now: _Pass) -> list[TokenMap]:
        return now.totals[max(now.totals)].plan(self.num_leading).by_row() if now.totals else []

    def _values(self, now: _Pass, kind: str, index: int) -> list[Tensor] | None:
        value = self._value(now, kind, index)
        return None if value is None else list(_behind(value, self.num_leading))

    def _value(self, now: _Pass, kind: str, index: int) -> Tensor | None:
        """The semantic value of the tokens that reach a block, class tokens included: (B, N), rows summing to one.

        Args:
            now: The call.
            kind: "class" for the attention of the class token, "self" for the column mean of attention.
            index: The block.

        Returns:
            None where there is no class token, or no such kind.
        """
        if kind not in ("class", "self") or (kind == "class" and not self.num_leading):
            return None
        before, projections = now.totals.get(index - 1), self._attention[index]
        ask = projections.class_attention if kind == "class" else projections.received
        value: Tensor = ask(before.log_sizes if before is not None else None)
        return value

    def _after_encoder(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self._passes.now
        if now.totals:
            output.last_hidden_state = self._restored(now, len(self._blocks) - 1, output.last_hidden_state)
        return output


def _behind(x: Tensor, leading: int) -> Tensor:
    """The tokens behind the leading ones."""
    return x[:, leading:] if leading else x
