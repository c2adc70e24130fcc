"""Copies of attached models are stock and their own, pickling is refused in words, and training goes on."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import attach, detach, report
from gen_turbo.engine.root import NoEffectWarning
from tests import tiny_transformers
from tests.schedules import blocks_of, par
from tests.snapshots import differences, model_state
from tests.tiny_family import random
from tests.tiny_hosts import image, run_unet, sd15_unet, sd_pipeline, unet_inputs
from tests.tiny_transformers import FAMILIES

UNET = "unet"
TIMES = (900, 700, 500)
Run = Callable[..., Tensor]
CASES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "attention": (UNET, lambda model: TurboProcessor(0.4)),
    "keys alone": (UNET, lambda model: TurboProcessor(0.4, kv_only=True, restore="copy")),
    "block": ("flux", lambda model: TurboProcessor(0.4, scope="block")),
    "span": ("sd3", lambda model: TurboProcessor(0.4, scope="block", merge_span=0)),
    "model": ("pixart-sigma", lambda model: TurboProcessor(0.4, scope="model")),
    "feature maps": ("kandinsky", lambda model: TurboProcessor(0.4)),
    "skipping": (UNET, lambda model: par(model, {"deep.1": [2], blocks_of(model)[0]: [1]}, inner="turbo")),
    "text": ("sd3", lambda model: TurboProcessor(0.4, text_ratio=0.4, proportional_attention=True, restore="copy")),
}


def made(name: str) -> nn.Module:
    """A model with the same weights every time."""
    return sd15_unet() if name == UNET else tiny_transformers.build(name)


def run(name: str, model: nn.Module) -> Tensor:
    """Three steps of it."""
    if name == UNET:
        return run_unet(model, TIMES, **unet_inputs())
    return tiny_transformers.run(name, model, TIMES)


@torch.no_grad()
def changed(model: nn.Module) -> nn.Module:
    """The model with other weights."""
    for weight in model.parameters():
        weight.mul_(0.9)
    return model


@pytest.mark.parametrize(("kind", "has_run"), [("attention", False), *((kind, True) for kind in CASES)])
def test_a_copy_is_stock_and_runs_its_own_weights(kind, has_run):
    """Catches a copy whose layers call those of the original, or reduce though nothing is attached to it."""
    name, reducer_of = CASES[kind]
    stock = run(name, changed(made(name)))
    model = made(name)
    with attach(model, reducer_of(model)):
        if has_run:
            run(name, model)
        reduced = run(name, model)
        twin = changed(copy.deepcopy(model))
        assert torch.equal(run(name, twin), stock)
        assert torch.equal(run(name, model), reduced)
    assert torch.equal(run(name, twin), stock) and report(twin).layers == []


@pytest.mark.parametrize("kind", ["keys alone", "block", "feature maps", "skipping"])
def test_a_copy_is_attached_to_on_its_own(kind):
    """Catches a copy that cannot be attached to, whose attachment reaches the original, or that stays when it goes."""
    name, reducer_of = CASES[kind]
    model, fresh = made(name), made(name)
    with attach(fresh, reducer_of(fresh)):
        expected = run(name, fresh)
    stock = run(name, model)
    attachment = attach(model, reducer_of(model))
    run(name, model)
    twin = copy.deepcopy(model)
    before = model_state(twin)
    other = attach(twin, reducer_of(model))
    assert torch.equal(run(name, twin), expected)
    attachment.detach()
    assert torch.equal(run(name, model), stock) and torch.equal(run(name, twin), expected)
    other.detach()
    assert torch.equal(run(name, twin), stock) and differences(before, model_state(twin)) == []
    detach(twin)


@pytest.mark.parametrize("kind", ["attention", "span", "text"])
def test_a_copy_outlives_the_original(kind):
    """Catches a copy that holds the original's layers by weak references alone."""
    name, reducer_of = CASES[kind]
    model = made(name)
    stock = run(name, model)
    attach(model, reducer_of(model))
    run(name, model)
    twin = copy.deepcopy(model)
    del model
    gc.collect()
    assert torch.equal(run(name, twin), stock)
    with attach(twin, reducer_of(twin)):
        assert not torch.equal(run(name, twin), stock)


@pytest.mark.parametrize("is_copied", [False, True])
def test_nothing_keeps_a_model_alive(is_copied):
    """Catches weights that stay in memory for ever when an attached pipeline or model is dropped."""
    pipe = sd_pipeline()
    pipe.set_attn_processor(TurboProcessor(0.4))
    image(pipe, steps=3)
    twin = copy.deepcopy(pipe.unet) if is_copied else None
    gone = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None and (twin is None) != is_copied


def test_a_copy_in_another_type():
    """Catches forwards bound to layers of the first type."""
    unet, inputs = sd15_unet(), unet_inputs()
    wide = {name: value.double() for name, value in inputs.items() if isinstance(value, Tensor)}
    stock = run_unet(sd15_unet().to(torch.float64), **wide)
    with attach(unet, TurboProcessor(0.4)):
        run_unet(unet, **inputs)
        twin = copy.deepcopy(unet).to(torch.float64)
        assert torch.equal(run_unet(twin, **wide), stock) and next(unet.parameters()).dtype == torch.float32
        with attach(twin, TurboProcessor(0.4)):
            reduced = run_unet(twin, **wide)
    assert reduced.dtype == torch.float64 and not torch.equal(reduced, stock)


def test_a_copy_of_a_copy_and_of_a_part():
    """Catches what a copy leaves of an attachment failing in the next copy, and blocks copied without their model."""
    unet, inputs = sd15_unet(), unet_inputs()
    stock = run_unet(unet, **inputs)
    attach(unet, TurboProcessor(0.4))
    twice = copy.deepcopy(copy.deepcopy(unet))
    assert torch.equal(run_unet(twice, **inputs), stock)
    block, given = unet.down_blocks[0].attentions[0].transformer_blocks[0], {"hidden_states": random(2, 256, 16)}
    part = copy.deepcopy(block)
    assert torch.equal(part(**given, encoder_hidden_states=random(2, 6, 32)), _alone(given))


def _alone(given: dict[str, Tensor]) -> Tensor:
    block = sd15_unet().down_blocks[0].attentions[0].transformer_blocks[0]
    return block(**given, encoder_hidden_states=random(2, 6, 32))


def test_a_copy_of_a_pipeline():
    """Catches a pipeline whose copy shares schedule, runs or layers with it."""
    pipe = sd_pipeline()
    stock = image(pipe, steps=5)
    pipe.set_attn_processor(TurboProcessor(0.4))
    reduced = image(pipe, steps=5)
    twin = copy.deepcopy(pipe)
    assert torch.equal(image(twin, steps=5), stock)
    twin.set_attn_processor(TurboProcessor(0.4))
    pipe.reset_attn_processor()
    assert torch.equal(image(pipe, steps=5), stock) and torch.equal(image(twin, steps=5), reduced)
    twin.reset_attn_processor()
    assert torch.equal(image(twin, steps=5), stock)


@pytest.mark.parametrize("kind", CASES)
def test_pickling_is_refused_in_words(kind):
    """Catches an error about weak references that tells nobody what to do, and a pickle that runs half attached."""
    name, reducer_of = CASES[kind]
    model = made(name)
    with attach(model, reducer_of(model)):
        with pytest.raises(TypeError, match=r"call gen_turbo\.detach before"):
            pickle.dumps(model)
        assert list(model.state_dict()) == list(made(name).state_dict())
    pickle.dumps(model)


TRAINED: dict[str, tuple[str, dict[str, object]]] = {
    "residual": (UNET, {"warmup_steps": 1}),
    "copied": (UNET, {"restore": "copy"}),
    "block": (UNET, {"warmup_steps": 1, "scope": "block"}),
    "transformer": ("sd3", {"warmup_steps": 1}),
    "transformer copied": ("flux", {"restore": "copy"}),
    "transformer blocks": ("pixart-sigma", {"warmup_steps": 1, "scope": "block"}),
    "one span": ("sd3", {"warmup_steps": 1, "scope": "model"}),
}


def gradients(name: str, settings: dict[str, object] | None, is_checkpointed: bool, has_backward: bool) -> list[Tensor]:
    """Gradients of all weights after three steps, backward after each or after the last; None is the stock model."""
    model = made(name).train()
    if is_checkpointed:
        model.enable_gradient_checkpointing()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    calls = [partial(_unet_call, model), partial(_transformer_call, name, model)]
    losses = []
    with attach(model, TurboProcessor(0.4, **settings)) if settings is not None else nullcontext():
        for time in (900, 700, 500):
            losses.append(calls[name != UNET](time).square().mean())
            if has_backward:
                losses[-1].backward()
        if not has_backward:
            sum(losses).backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def _unet_call(model: nn.Module, time: int) -> Tensor:
    inputs = unet_inputs()
    return model(inputs["sample"], torch.tensor(time), encoder_hidden_states=inputs["encoder_hidden_states"]).sample


def _transformer_call(name: str, model: nn.Module, time: int) -> Tensor:
    family = FAMILIES[name]
    call = family.inputs(2, (8, 8)) | family.time(time, 2)
    return model(hidden_states=random(2, *family.latents((8, 8))), **call, return_dict=False)[0]


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("has_backward", [True, False])
def test_checkpointing_runs_in_full_and_says_so(kind, has_backward):
    """Catches blocks that run once more in the backward pass, on maps and memory that have moved on, in silence."""
    name, settings = TRAINED[kind]
    expected = gradients(name, None, is_checkpointed=True, has_backward=has_backward)
    with pytest.warns(NoEffectWarning, match="call disable_gradient_checkpointing"):
        found = gradients(name, settings, is_checkpointed=True, has_backward=has_backward)
    assert len(expected) == len(found) > 0 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", TRAINED)
def test_one_backward_pass_over_several_steps(kind):
    """Catches memory that is written over before the backward pass has read it."""
    name, settings = TRAINED[kind]
    expected = gradients(name, settings, is_checkpointed=False, has_backward=True)
    found = gradients(name, settings, is_checkpointed=False, has_backward=False)
    assert len(expected) == len(found) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
