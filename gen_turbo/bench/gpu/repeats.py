"""Whether a model repeats its own logits, and whether they are the same while a method of ratio 0 is attached."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gen_turbo.api import attach
from gen_turbo.bench.gpu.journal import RUNS
from gen_turbo.bench.gpu.readers import inputs
from gen_turbo.factory import build_processor

NEW_TOKENS = 4
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def prepare() -> None:
    """Lets matrix products be deterministic where that is asked for; works before the first of a process only."""
    # As large as what cuBLAS takes of itself on these cards.
    os.environ.setdefault(_WORKSPACE, ":4096:8")


def differing(model: Any, batch: int) -> dict[str, int]:
    """Counts the logits of four new tokens that differ from those of stock's second run, bit by bit.

    Each of `RUNS` is counted twice: as torch comes, and with `torch.use_deterministic_algorithms`.
    """
    counts: dict[str, int] = {}
    given = inputs(model, batch)
    for prefix in ("", "deterministic_"):
        with _deterministic(bool(prefix)):
            first, second = _logits(model, given), _logits(model, given)
            nothing: Any = build_processor({"method": "turbo", "ratio": 0.0})
            with attach(model, nothing):
                attached = _logits(model, given)
            found = (first, attached, _logits(model, given))
        counts["logits"] = second.numel()
        counts |= {prefix + name: int((run != second).sum()) for name, run in zip(RUNS, found, strict=True)}
    return counts


def _logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    done = model.generate(
        **given,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # Their bits: two of them that are no number are equal, too.
    return torch.stack(done.logits).float().view(torch.int32)


@contextmanager
def _deterministic(is_wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if is_wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
