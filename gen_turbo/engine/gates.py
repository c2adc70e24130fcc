"""Gates in front of modules: they let a call through, remember its result, or answer by a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.guided import combined
from gen_turbo.engine.layer import argument_names
from gen_turbo.engine.placed import Placed
from gen_turbo.engine.values import mapped, num_bytes, refilled, tensors
from gen_turbo.models.adapter import LayerSignature, Unit

NUM_USED = 2
"""Results that a forecast by a slope is made of."""


class Action(Enum):
    """What a gate does in the running step."""

    PASS = "pass"
    KEEP = "keep"
    FORECAST = "forecast"
    IDLE = "idle"


@dataclass
class UnitMemory:
    """The last results of one module in one context, in tensors of fixed address.

    Attributes:
        weights: Of the results in a forecast, the newest first: numbers, each for the whole batch or one for each of
            its guidance branches, or 0-dim tensors where a graph reads them.
        results: Tensors of the last results, the newest first; zeros as long as there are fewer.
        like: A result with tensors that hold one number each.
        calls: The calls of the schedule that gave them, newest first.
        is_forecast: Whether results are remembered; of what only idles, nobody reads them.
        error: How far the last forecast would have been off, relative, where the module ran; None if it is not wanted.
    """

    weights: list[Any]
    results: list[list[Tensor]] = field(default_factory=list)
    like: Any = None
    calls: list[int] = field(default_factory=list)
    is_forecast: bool = True
    error: float | None = None

    def keep(self, result: Any, values: list[Tensor]) -> None:
        """Remembers a result; the oldest gives way."""
        if self.like is None:
            self.like = mapped(result, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))
        if not self.is_forecast:
            return
        if not self.results:
            older = [[torch.zeros_like(value) for value in values] for _ in self.weights[1:]]
            self.results = [[value.detach().clone() for value in values], *older]
            return
        if self.error is not None and len(self.calls) >= NUM_USED:
            self.error = distance(self.forecast(), values)
        for place in range(len(self.results) - 1, 0, -1):
            for tensor, newer in zip(self.results[place], self.results[place - 1], strict=True):
                tensor.copy_(newer)
        for newest, value in zip(self.results[0], values, strict=True):
            newest.copy_(value.detach())

    def weigh(self, weights: Sequence[Any]) -> None:
        """Sets the weights of the next forecast; those that are not given are 0."""
        for place, held in enumerate(self.weights):
            weight = weights[place] if place < len(weights) else 0.0
            if isinstance(held, Tensor):
                held.fill_(weight)
            else:
                self.weights[place] = weight

    def forecast(self) -> list[Tensor]:
        """What the module would give."""
        return [combined(parts, self.weights) for parts in zip(*self.results, strict=True)]

    def corrected(self, values: list[Tensor], weights: Sequence[Any]) -> list[Tensor]:
        """Newer values and what is remembered, weighed; the first weight is that of the newer values."""
        known = [values, *self.results][: len(weights)]
        return [combined(parts, weights) for parts in zip(*known, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return num_bytes(*(tensor for result in self.results for tensor in result), *self.weights)


class Gate(Placed):
    """Stands in front of a module whose result is remembered and forecast."""

    action = Action.PASS

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.memory: UnitMemory = None  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module or stands for it."""
        if self.action is Action.PASS:
            return self.inner(*args, **kwargs)
        if self.action is Action.IDLE:
            return mapped(self.memory.like, _zeros)
        if self.action is Action.FORECAST:
            return refilled(self.memory.like, self.memory.forecast())
        result = self.inner(*args, **kwargs)
        self.memory.keep(result, tensors(result))
        return result


class BlockGate(Gate):
    """The gate of a block with a residual stream: the change of its input is remembered and forecast."""

    def __init__(self, name: str, module: nn.Module, signature: LayerSignature) -> None:
        super().__init__(name, module)
        self.signature, self.names = signature, argument_names(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block, or adds the change as it is forecast."""
        if self.action is Action.PASS:
            return self.inner(*args, **kwargs)
        given = dict(zip(self.names[: len(args)], args, strict=True))
        given.update(kwargs)
        if self.action is Action.KEEP:
            result = self.inner(**given)
            self.memory.keep(result, self._changes(given, result))
            return result
        left = iter(self.memory.forecast())
        outputs = self.memory.like if isinstance(self.memory.like, tuple) else (self.memory.like,)
        added: list[Tensor | None] = []
        for index, shape in enumerate(outputs):
            before = self._input_of(given, index, shape)
            added.append(None if shape is None else next(left) if before is None else before + next(left))
        return tuple(added) if isinstance(self.memory.like, tuple) else added[0]

    def _changes(self, given: dict[str, Any], result: Any) -> list[Tensor]:
        changes = []
        for index, value in enumerate(result if isinstance(result, tuple) else (result,)):
            if value is not None:
                before = self._input_of(given, index, value)
                changes.append(value if before is None else value - before)
        return changes

    def _input_of(self, given: dict[str, Any], index: int, output: Tensor | None) -> Tensor | None:
        """The input that an output adds to; None where there is none of its shape."""
        if index in self.signature.plain:
            return None
        value = given.get(self.signature.tokens if index in self.signature.outputs else self.signature.carries)
        is_same = isinstance(value, Tensor) and output is not None and value.shape == output.shape
        return value if is_same else None


def gates_of(model: nn.Module, units: dict[str, Unit]) -> dict[str, Gate]:
    """A gate for every module of units but the whole model; nothing is changed yet."""
    gates: dict[str, Gate] = {}
    for unit in units.values():
        for name in (unit.module, *unit.idle):
            if not name or name in gates:
                continue
            module = model.get_submodule(name)
            is_block = name == unit.module and unit.signature is not None
            gates[name] = BlockGate(name, module, unit.signature) if is_block else Gate(name, module)  # type: ignore[arg-type]
    return gates


def _zeros(like: Tensor) -> Tensor:
    return like.new_zeros(like.shape)


def distance(guess: list[Tensor], actual: list[Tensor]) -> float:
    """Relative distance of a result, as a list of tensors, to what it should be; 0 where that is all zeros."""
    off = sum(float((a - b).float().square().sum()) for a, b in zip(guess, actual, strict=True))
    size = sum(float(tensor.float().square().sum()) for tensor in actual)
    return float((off / size) ** 0.5) if size else 0.0
