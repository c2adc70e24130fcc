"""Listening to what an attachment of a vision-language model keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gen_turbo.vlm.run import Reduction


def watch_reductions(part: Any, listener: Callable[[Reduction], None]) -> bool:
    """Notifies a listener of every reduction of image tokens, from the next call on until the attachment is made anew.

    Returns:
        Whether there is any place where this attachment reduces the tokens of a prompt.
    """
    stages = [stage for name in ("_gate", "_cut") if (stage := getattr(part, name, None)) is not None]
    for stage in stages:
        stage.on_reduction = _both(stage.on_reduction, listener)
    return bool(stages)


def _both(first: Callable[..., None], second: Callable[[Reduction], None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        first(*arguments)
        second(arguments[-1])

    return call
