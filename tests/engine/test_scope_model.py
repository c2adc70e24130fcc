"""scope="model": a transformer runs short from its first block to its last, with one residual for all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stated import TurboProcessor
from torch.overrides import TorchFunctionMode

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.engine.span import FirstBlock, LastBlock, SpanBlock
from tests.engine.families import family, relative
from tests.snapshots import differences, model_state
from tests.tiny_transformers import FAMILIES, random

NAMES = ["pixart-sigma", "sd3", "flux", "wan"]
TIMES = (900, 700, 500, 300)
TEXT = {"sd3": 5, "flux": 5}
"""Text tokens that share a sequence with the image in attention."""
TOKENS = {name: 64 for name in NAMES} | {"wan": 3 * 64}
KEPT = {name: 64 - int(64 * 0.4) for name in NAMES} | {"wan": 3 * (64 - int(64 * 0.4))}


def turbo(ratio: float = 0.4, **settings: object) -> TurboProcessor:
    """A processor of the scope."""
    return TurboProcessor(ratio, scope="model", **settings)


class Lengths(TorchFunctionMode):
    """Notes how many queries each self-attention sees; of cross-attention, where all else is text, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
        if func is F.scaled_dot_product_attention and given["query"].shape[-2] == given["key"].shape[-2]:
            self.seen.append(given["query"].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_removed_is_bit_identical(name):
    """Catches blocks that are called another way than the model calls them."""
    model, run = family(name)
    stock = run(times=TIMES)
    for reducer in (turbo(0.0), turbo(step_scale={0: 0.0}), IdentityProcessor(0.4, scope="model")):
        with attach(model, reducer):
            assert torch.equal(run(times=TIMES), stock)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_runs_short(name):
    """Catches a sequence that is restored between blocks or stacks, and tables of positions of the long one."""
    model, run = family(name)
    stock = run(times=TIMES[:1])
    with attach(model, turbo(restore="copy")) as attachment, Lengths() as lengths:
        reduced = run(times=TIMES[:1])
        rows = [row for row in report(model).layers if row.status == "reduced"]
    assert len(rows) == len(attachment.layers) == len(lengths.seen) > 1
    assert set(lengths.seen) == {KEPT[name] + TEXT.get(name, 0)}
    assert {(row.num_tokens, row.num_kept, row.num_reduced) for row in rows} == {(TOKENS[name], KEPT[name], 1)}
    assert reduced.shape == stock.shape and 0 < relative(reduced, stock) < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_one_span_over_all_blocks(name):
    """Catches a span that ends with a stack: two residuals and a gather in the middle of Flux."""
    model, _ = family(name)
    with attach(model, turbo()) as attachment:
        layers = attachment.parts[0].layers
    assert len({id(layer.span) for layer in layers}) == 1
    between = [SpanBlock] * (len(layers) - 2)
    assert [type(layer) for layer in layers] == [FirstBlock, *between, LastBlock]


@pytest.mark.parametrize("name", NAMES)
def test_a_reduced_step_between_equal_full_steps_is_exact(name):
    """Catches detail of one block in the place of all, and text that goes on from full blocks in a refresh."""
    model, _ = family(name)
    kind, latents = FAMILIES[name], random(1, *FAMILIES[name].latents((8, 8)))
    before = model_state(model)
    with attach(model, turbo(extrapolation_order=0, warmup_steps=1)), torch.no_grad():
        calls = [kind.inputs(1, (8, 8)) | kind.time(time, 1) for time in (500.0, 499.999)]
        full, reduced = (model(hidden_states=latents, **call, return_dict=False)[0] for call in calls)
        assert all(row.num_reduced == 1 for row in report(model).layers)
    assert relative(reduced, full) < 1e-3
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_refresh_is_the_stock_step(name):
    """Catches a refresh that hands the merged sequence on to the model."""
    model, run = family(name)
    stock = run(times=TIMES)
    with attach(model, turbo()):
        reduced = run(times=TIMES)
    assert torch.equal(reduced[:2], stock[:2]) and not torch.equal(reduced[2:], stock[2:])


@pytest.mark.parametrize("name", NAMES)
def test_one_residual_for_each_output(name):
    """Catches residuals of every block, as scope="block" has them."""
    model, run = family(name)
    held = {}
    for scope in ("block", "model"):
        for order in (0, 1):
            with attach(model, TurboProcessor(0.4, scope=scope, extrapolation_order=order)) as attachment:
                run(times=TIMES)
                held[scope, order] = report(model).most_remembered_bytes
                num_blocks = len(attachment.layers)
    width = 32
    per_image = 4 * 2 * TOKENS[name] * width
    per_text = 4 * 2 * TEXT.get(name, 0) * width
    # The last block of SD3 gives no text.
    num_texts = num_blocks - (name == "sd3")
    # Order 1 remembers as much again; maps are as before.
    assert held["block", 1] - held["block", 0] == num_blocks * per_image + num_texts * per_text
    assert held["model", 1] - held["model", 0] == per_image + per_text * (name == "flux")


@pytest.mark.parametrize("name", NAMES)
def test_detaching_gives_every_object_back(name):
    """Catches leftovers, also where a block has raised in the middle of a span."""
    model, run = family(name)
    before, stock = model_state(model), run(times=TIMES[:1])
    attachment = attach(model, turbo(warmup_steps=1))
    run(times=TIMES)
    handle = model.get_submodule(attachment.layers[-1]).register_forward_pre_hook(_break)
    with pytest.raises(ZeroDivisionError):
        run(times=TIMES)
    handle.remove()
    attachment.detach()
    assert differences(before, model_state(model)) == [] and torch.equal(run(times=TIMES[:1]), stock)


def _break(module: torch.nn.Module, args: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("settings", [{}, {"restore": "copy"}, {"match_every": 3, "restore": "copy"}])
def test_it_is_one_span_of_blocks_where_there_is_one_stack(settings):
    """Catches a scope that does otherwise than blocks that share one short sequence."""
    for name in ("pixart-sigma", "wan", "sd3"):
        model, run = family(name)
        with attach(model, turbo(**settings)):
            whole = run(times=TIMES)
        with attach(model, TurboProcessor(0.4, scope="block", merge_span=0, **settings)):
            assert torch.equal(run(times=TIMES), whole)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd15", "scope='model' needs a transformer, UNet2DConditionModel is none; use scope='block'"),
        ("sdxl", "scope='model' needs a transformer, UNet2DConditionModel is none; use scope='block'"),
        ("controlnet", "scope='model' needs a transformer, ControlNetModel is none; use scope='block'"),
        ("kandinsky", "scope='model' has no blocks to merge in UNet2DConditionModel; use scope='attention'"),
        ("hunyuan-dit", "the blocks of HunyuanDiT2DModel are linked across spans; use scope='block' with merge_span=1"),
    ],
)
def test_other_models_are_refused(name, words):
    """Catches a model that is left half attached, and a refusal that tells nobody what to do."""
    model, _ = family(name)
    before = model_state(model)
    with pytest.raises(ValueError) as caught:
        attach(model, turbo())
    assert words in str(caught.value) and differences(before, model_state(model)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"merge_span": 2}, "merge_span=2 is of whole blocks; use scope='block', got 'model'"),
        ({"kv_only": True}, "kv_only can only be set with scope='attention' or 'auto', got 'model'"),
    ],
)
def test_settings_of_other_scopes_are_refused(settings, words):
    """Catches a setting that is ignored in silence."""
    with pytest.raises(ValueError, match=words):
        turbo(**settings)


def test_a_refusal_says_what_works():
    """Catches advice that changes nothing."""
    with pytest.raises(ValueError) as caught:
        attach(family("hunyuan-dit")[0], turbo())
    assert "scope='block'" in str(caught.value)


def test_what_reaches_between_blocks_is_refused():
    """Catches residuals of a ControlNet that meet a short sequence."""
    model, _ = family("flux")
    kind = FAMILIES["flux"]
    call = kind.inputs(1, (8, 8)) | kind.time(900, 1)
    told = "controlnet_block_samples reaches between blocks.*; use scope='block' with merge_span=1"
    with attach(model, turbo()), pytest.raises(ValueError, match=told):
        model(hidden_states=random(1, 64, 8), **call, controlnet_block_samples=[random(1, 64, 32)])
