"""Runs of blocks on one short sequence: merged once, restored once, remembered once."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.engine import layer
from gen_turbo.kernels import restore
from tests.engine.families import family, relative
from tests.snapshots import differences, model_state
from tests.tiny_transformers import FAMILIES, random

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

JOINED = ["sd3", "flux", "cogview4", "lumina2", "wan", "mochi"]
TIMES = (900, 700, 500)


def _turbo(**settings):
    return TurboProcessor(0.4, scope="block", **{"merge_span": 0} | settings)


@pytest.mark.parametrize("name", [*JOINED, "sdxl"])
def test_nothing_removed_is_bit_identical(name):
    """Catches blocks that are called another way than the model calls them."""
    model, run = family(name)
    stock = run(times=TIMES)
    for processor in (_turbo(step_scale={0: 0.0}), IdentityProcessor(0.4, scope="block", merge_span=0)):
        with attach(model, processor):
            assert torch.equal(run(times=TIMES), stock)


@pytest.mark.parametrize("name", JOINED)
def test_a_corrected_step_between_equal_full_steps_is_exact(name):
    """Catches text that the merged run of a full step takes from the full blocks, and detail of one block."""
    model, _ = family(name)
    kind, latents = FAMILIES[name], random(1, *FAMILIES[name].latents((8, 8)))
    before = model_state(model)
    with attach(model, _turbo(extrapolation_order=0, warmup_steps=1)), torch.no_grad():
        calls = [kind.inputs(1, (8, 8)) | kind.time(time, 1) for time in (500.0, 499.999)]
        full, corrected = (model(hidden_states=latents, **call, return_dict=False)[0] for call in calls)
        assert all(layer.num_reduced == 1 for layer in report(model).layers)
    assert 0 < relative(corrected, full) < 1e-3
    assert differences(before, model_state(model)) == []


def test_tokens_are_merged_and_remembered_once(monkeypatch):
    """Catches restoring and remembering after every block."""
    made = []
    monkeypatch.setattr(layer, "restore", lambda *args: made.append(1) or restore(*args))
    seen = {}
    for length in (1, 2, 0):
        model, run = family("sd3")
        made.clear()
        with attach(model, _turbo(merge_span=length, warmup_steps=1)):
            run(times=TIMES[:2])
            seen[length] = len(made), report(model).most_remembered_bytes
    # Three blocks; twice each: what the full step remembers and what the second step restores.
    assert [number for number, _ in seen.values()] == [6, 4, 2]
    assert seen[1][1] > seen[2][1] > seen[0][1]


def test_spans_end_with_a_stack():
    """Catches a span from one stack of blocks into another, whose tokens may be of other grids."""
    model, _ = family("sdxl")
    with attach(model, TurboProcessor(0.4, scope="block", merge_span=0, max_downsample=4)) as attachment:
        blocks = attachment.parts[0].layers
        spans: dict[int, list[str]] = {}
        for block in blocks:
            spans.setdefault(id(getattr(block, "span", block)), []).append(block.name)
    assert [block.name for block in blocks] == list(attachment.layers)
    assert all(len({name.rpartition(".")[0] for name in span}) == 1 for span in spans.values())
    assert max(map(len, spans.values())) == 2


def test_what_reaches_between_blocks_is_refused():
    """Catches residuals of a ControlNet that meet a short sequence in a matrix product far away."""
    model, run = family("flux")
    told = "controlnet_block_samples reaches between blocks.*; use scope='block' with merge_span=1"
    with attach(model, _turbo()), pytest.raises(ValueError, match=told):
        kind = FAMILIES["flux"]
        call = kind.inputs(1, (8, 8)) | kind.time(900, 1)
        model(hidden_states=random(1, 64, 8), **call, controlnet_block_samples=[random(1, 64, 32)])
    with pytest.raises(ValueError, match="linked across spans; use scope='block' with merge_span=1"):
        attach(family("hunyuan-dit")[0], _turbo())
