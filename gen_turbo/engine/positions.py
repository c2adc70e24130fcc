"""Positions that stay the same from step to step, as rotary tables: made, and their rows taken, once a run."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from gen_turbo.engine.placed import Placed
from gen_turbo.engine.values import num_bytes, tensors
from gen_turbo.tokens.tables import is_capturing


@dataclass
class Positions:
    """What is remembered of the positions of one context.

    Attributes:
        given: Arguments of the model that they depend on, not kept alive from here, with the number of times each had
            been written to.
        made: For each module that makes positions, the shapes that it was asked for and what it gave, by path.
    """

    given: tuple[tuple[weakref.ref[Tensor], int], ...] = ()
    made: dict[str, tuple[object, Any]] = field(default_factory=dict)

    def may_be_kept(self, arguments: Sequence[Any]) -> bool:
        """Notes the arguments of a call and forgets what was made of others; False where changes cannot be seen."""
        if not all(isinstance(value, Tensor) and not value.is_inference() for value in arguments):
            self.forget()
            return False
        before = [(reference(), count) for reference, count in self.given]
        is_same = len(before) == len(arguments) and all(
            value._version == count and value is old for value, (old, count) in zip(arguments, before, strict=True)
        )
        if not is_same:
            self.forget()
            self.given = tuple((weakref.ref(value), value._version) for value in arguments)
        return True

    def holds(self, value: Any) -> bool:
        """Whether a value is one of those made."""
        return any(value is made for _, made in self.made.values())

    def forget(self) -> None:
        """Drops all of it."""
        self.given, self.made = (), {}

    @property
    def num_bytes(self) -> int:
        """Bytes of what was made."""
        return num_bytes(*(tensor for _, made in self.made.values() for tensor in tensors(made)))


class PositionMaker(Placed):
    """Stands in front of a module of diffusers that makes positions of shapes and of arguments of the model.

    Attributes:
        depends_on: Those arguments, by name.
        positions: What the running context remembers; None where nothing is to be remembered.
    """

    positions: Positions | None = None

    def __init__(self, name: str, module: Any, depends_on: tuple[str, ...]) -> None:
        super().__init__(name, module)
        self.depends_on = depends_on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Gives what it gave before where it is asked for the same, else what the module makes."""
        # A graph makes its own each time, for what it reads has to stay where it is.
        if is_compiling() or self.positions is None or is_capturing():
            return self.inner(*args, **kwargs)
        shapes = [tensor.shape for tensor in tensors([args, kwargs])]
        asked, made = self.positions.made.get(self.name, (None, None))
        if asked != shapes:
            made = self.inner(*args, **kwargs)
            self.positions.made[self.name] = shapes, made
        return made


def lend(makers: Sequence[PositionMaker], positions: Positions | None, arguments: Mapping[str, Any]) -> None:
    """Lets modules that make positions give again what they made of the same arguments; of None, each makes its own."""
    needs = dict.fromkeys(name for maker in makers for name in maker.depends_on)
    if positions is not None and not (makers and positions.may_be_kept([arguments.get(name) for name in needs])):
        positions = None
    for maker in makers:
        maker.positions = positions
