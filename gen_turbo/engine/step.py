"""One call of a denoiser, as it is given and as it is run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gen_turbo.engine.attention import InsideAttention
from gen_turbo.engine.context import Context
from gen_turbo.engine.guided import rows_of


class Step:
    """One call of the model, from when it is found to when it is counted.

    Attributes:
        context: What it continues; None where it runs as it is.
        args: What the model is given by position.
        kwargs: What it is given by name.
        skipped: The units that are left out.
        run: What stands for the model; None where the model runs itself.
        output: What it gave; None until then.
    """

    def __init__(self, context: Context | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.context, self.args, self.kwargs = context, args, kwargs
        self.skipped: frozenset[str] = frozenset()
        self.run: Any = None
        self.output: Any = None

    def narrow(self, rows: slice, insides: Iterable[InsideAttention]) -> None:
        """Gives the model, and the attention that weighs merged text, some rows of the batch alone."""
        assert self.context is not None
        batch = self.context.layout.shape[0]
        self.args, self.kwargs = rows_of(self.args, rows, batch), rows_of(self.kwargs, rows, batch)
        for inside in insides:
            inside.text_sizes = rows_of(inside.text_sizes, rows, batch)


def eagerly(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function of which nothing is compiled: in the first step of a run layers find their maps and memory."""
    with torch.compiler.set_stance("force_eager"):
        return function(*args, **kwargs)
