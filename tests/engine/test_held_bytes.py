"""What the report says is held, beside all tensors that Python has made since."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from stated import TurboProcessor
from torch import Tensor
from torch.nn import Parameter

from gen_turbo import attach, report
from tests.engine.families import family

SETTINGS: dict[str, dict[str, Any]] = {
    "residual": {},
    "copied": {"restore": "copy"},
    "new plans": {"match_every": 1, "stagger": True},
    "block": {"scope": "block"},
    "full queries": {"restore": "copy", "kv_only": True},
    "ratios": {"restore": "copy", "step_scale": {0: 1.0, 0.5: 0.5}},
    "text": {"text_ratio": 0.4},
}


def alive() -> list[Tensor]:
    """Every tensor with memory of its own that Python knows of; what torch.compile traces with has none."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (Tensor, Parameter) and not x.is_meta]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of what tensors read, by address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.mark.parametrize(
    ("name", "kind"), [("sd15", kind) for kind in SETTINGS if kind != "text"] + [("flux", kind) for kind in SETTINGS]
)
def test_all_that_a_run_holds_is_told(name, kind):
    """Catches index tensors of maps, rows of positions and merged text that the report leaves out."""
    model, run = family(name)
    with attach(model, TurboProcessor(0.4, **SETTINGS[kind])) as attachment:
        # What methods know of a grid stays for other runs.
        run(times=(900, 700))
        attachment.parts[0].root.runs.forget()
        before = alive()
        run(times=(900, 700))
        (context,) = attachment.parts[0].root.runs.contexts()
        # The prompt is the caller's.
        known = storages([*before, context.conditioning])
        held = {address: size for address, size in storages(alive()).items() if address not in known}
        assert report(model).remembered_bytes == sum(held.values()) > 0


def test_a_limit_counts_maps_too():
    """Catches a limit that residuals keep and maps exceed, and maps of layers that are left alone."""
    model, run = family("sd15")
    for limit in (0.0, 0.02, 0.05, 0.1):
        with attach(model, TurboProcessor(0.4, memory_limit_mb=limit)):
            run(times=(900, 700))
            told = report(model)
            assert told.most_remembered_bytes <= 1e6 * limit + 16
