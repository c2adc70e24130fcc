"""Listening to what an attachment of a vision-language model keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gen_turbo.vlm.run import Images, Reduction


def watch_reductions(part: Any, listener: Callable[[Reduction], None]) -> bool:
    """Notifies a listener of every reduction of image tokens, from the next call on until the attachment is made anew.

    Returns:
        Whether there is any place where this attachment reduces the tokens of a prompt.
    """
    stages = [stage for name in ("_gate", "_cut") if (stage := getattr(part, name, None)) is not None]
    for stage in stages:
        stage.on_reduction = _both(stage.on_reduction, listener)
    return bool(stages)


def _both(
    first: Callable[[Images, Reduction], None], second: Callable[[Reduction], None]
) -> Callable[[Images, Reduction], None]:
    def told(images: Images, reduction: Reduction) -> None:
        first(images, reduction)
        second(reduction)

    return told
