"""Listening to what an attachment of a vision-language model keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gen_turbo.vlm.run import Pictures, Reduction


def watch_reductions(part: Any, listener: Callable[[Reduction], None]) -> bool:
    """Tells a listener of every reduction of image tokens, from the next call on until the attachment is made anew.

    Returns:
        Whether there is any place where this attachment reduces the tokens of a prompt.
    """
    stages = [stage for name in ("_gate", "_cut") if (stage := getattr(part, name, None)) is not None]
    for stage in stages:
        stage.on_reduction = _both(stage.on_reduction, listener)
    return bool(stages)


def _both(
    first: Callable[[Pictures, Reduction], None], second: Callable[[Reduction], None]
) -> Callable[[Pictures, Reduction], None]:
    def told(pictures: Pictures, reduction: Reduction) -> None:
        first(pictures, reduction)
        second(reduction)

    return told
