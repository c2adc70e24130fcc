"""One call of one layer, in full or on merged tokens, by what its form says of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from gen_turbo.engine.base import Form, Observation, Table, coarsened
from gen_turbo.method import Grid
from gen_turbo.tokens.token_map import TokenMap


@dataclass
class Call:
    """One call of a layer that can be made on merged tokens.

    Attributes:
        function: The layer, called with arguments by name.
        arguments: What it was called with.
        form: Where the image tokens are.
        observation: What the call of the model's root showed.
        grid: (height, width) of the tokens of a frame; None where it is not known.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    form: Form
    observation: Observation
    grid: Grid | None

    @classmethod
    def of(
        cls, function: Callable[..., Any], arguments: dict[str, Any], form: Form, observation: Observation, coarse: int
    ) -> Call | None:
        """Reads a call; None if it brings something per token that the form does not know of."""
        tokens = arguments.get(form.tokens)
        has_shape = isinstance(tokens, Tensor) and tokens.ndim == (4 if form.is_map else 3)
        if not has_shape or any(arguments.get(name) is not None for name in form.none):
            return None
        grid = None if observation.grid is None else coarsened(observation.grid, coarse)
        call = cls(function, arguments, form, observation, grid)
        if call.num_image != call.num_frames * call.num_grid:
            call.grid = None
        return call if call.leading >= 0 and call.num_image > 0 else None

    @cached_property
    def sequence(self) -> Tensor:
        """The tokens of the sequence, (B, S, C), text included where it is part of it."""
        x: Tensor = self.arguments[self.form.tokens]
        return x.flatten(2).transpose(1, 2) if self.form.is_map else x

    @property
    def num_frames(self) -> int:
        """Frames whose tokens follow each other."""
        return self.observation.num_frames

    @property
    def num_grid(self) -> int:
        """Tokens of a frame by the grid; 0 where there is none."""
        return self.grid[0] * self.grid[1] if self.grid else 0

    @property
    def leading(self) -> int:
        """Text tokens before the image tokens."""
        return self.observation.num_text if self.form.has_text_before else 0

    @cached_property
    def num_image(self) -> int:
        """Image tokens."""
        rest = self.sequence.shape[1] - self.leading
        return min(self.num_frames * self.num_grid, rest) if self.form.has_text_after else rest

    @property
    def trailing(self) -> int:
        """Tokens behind the image tokens."""
        return self.sequence.shape[1] - self.leading - self.num_image

    @property
    def tokens(self) -> Tensor:
        """The image tokens, (B, N, C)."""
        return self.sequence[:, self.leading : self.leading + self.num_image]

    def on_slots(self, plan: TokenMap) -> list[Any]:
        """Calls the layer on merged tokens and gives its outputs with a row per token again."""
        short = self.merged(plan)
        return self.restored(self.function(**self.shortened(plan, short)), plan, short)

    def merged(self, plan: TokenMap) -> Tensor:
        """The sequence with its image tokens merged."""
        return self._wide(plan).merge(self.sequence)

    def shortened(self, plan: TokenMap, short: Tensor) -> dict[str, Any]:
        """The arguments with one row per slot."""
        given = self.arguments[self.form.tokens]
        changed: dict[str, Any] = {
            self.form.tokens: short.transpose(1, 2)[..., None].contiguous() if self.form.is_map else short
        }
        for name in self.form.also:
            value = self.arguments.get(name)
            if value is not None:
                changed[name] = changed[self.form.tokens] if value is given else self._wide(plan).merge(value)
        for table in self.form.tables:
            value = changed.get(table.name, self.arguments.get(table.name))
            if value is not None:
                changed[table.name] = self._taken(value, table, plan)
        return {**self.arguments, **changed}

    def restored(self, output: Any, plan: TokenMap, short: Tensor) -> list[Any]:
        """Gives the image tokens of an output of the short sequence a row per token again."""
        outputs = flat(output)
        for index in self.form.outputs:
            if index < len(outputs):
                outputs[index] = self._long(outputs[index], plan, short)
        return outputs

    def _long(self, y: Tensor, plan: TokenMap, short: Tensor) -> Tensor:
        wide = self._wide(plan)
        if self.form.is_map:
            y = y.flatten(2).transpose(1, 2)
        y = self.sequence + wide.unmerge(y - short) if self.form.is_residual else wide.unmerge(y)
        if self.form.is_map:
            y = y.transpose(1, 2).reshape(self.arguments[self.form.tokens].shape)
        return y

    def _wide(self, plan: TokenMap) -> TokenMap:
        return plan.between(self.leading, self.trailing)

    def _taken(self, value: Any, table: Table, plan: TokenMap) -> Any:
        if isinstance(value, tuple | list):
            taken = (i in table.items or not table.items for i in range(len(value)))
            return type(value)(self._taken(v, table, plan) if ours else v for v, ours in zip(value, taken, strict=True))
        before = self.observation.num_text if table.has_text_before else 0
        wide = plan.between(before, value.shape[table.axis] - before - self.num_image)
        return (
            wide.select(value[None])[0]
            if table.axis == 0
            else wide.select(value.movedim(table.axis, 1)).movedim(1, table.axis)
        )


def flat(output: Any) -> list[Any]:
    """The items of an output, which is a tensor or a tuple."""
    return list(output) if isinstance(output, tuple | list) else [output]


def like(outputs: list[Any]) -> Any:
    """One item as it is, several as a tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
