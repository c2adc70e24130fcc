"""Models that are trained, checkpointed or moved while something is attached."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import PARProcessor, RandomProcessor, TurboProcessor, attach
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.vlm.settings import Placed
from tests.vlm.tiny_vlms import PROMPTS, VLMS

METHODS = {
    "pre_llm": TurboProcessor(0.6),
    "decoder": Placed(TurboProcessor(0.6), place="decoder"),
    "tower": Placed(TurboProcessor(0.6), place="tower"),
    "random tower": Placed(RandomProcessor(0.5), place="tower"),
    "groups": VisToGVisionProcessor(0.5),
    "par": PARProcessor(router="uniform", tokens=0.5, layers=3),
}
CASES = [("llava", name) for name in METHODS] + [("qwen2_5", "tower"), ("qwen3", "random tower")]


def checkpoint(model):
    """Has activations computed again, by either name that transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def gradients(model, calls):
    """The gradient of a loss of several calls at once."""
    loss = sum(model(**one, use_cache=False).logits.float().square().mean() for one in calls)
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_checkpointed_gradients_are_those_of_the_call(family, name):
    """Catches blocks computed again without what was merged or masked, or with that of the call that came last."""
    vlm, found = VLMS[family], []
    calls = [PROMPTS["padded"].inputs(vlm, seed) for seed in (1, 2)]
    for is_checkpointed in (False, True):
        model = vlm.make("sdpa").train()
        if is_checkpointed:
            checkpoint(model)
        torch.manual_seed(0)
        with attach(model, METHODS[name]):
            found.append(gradients(model, calls))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][weight], found[1][weight]) for weight in found[0])


@pytest.mark.parametrize("name", ["tower", "groups"])
def test_checkpointing_that_comes_late_is_refused(name):
    """Catches recomputed blocks that know nothing of the call, whose masks or merges are then missing."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa").train(), PROMPTS["one"].inputs(vlm)
    with attach(model, METHODS[name]):
        checkpoint(model)
        with pytest.raises(ValueError, match="gradient checkpointing of the vision tower was enabled after"):
            model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_was_moved_is_as_if_it_had_been_before(name):
    """Catches tensors of the type that the model had when it was attached to, or when it ran last."""
    vlm, found = VLMS["llava"], []
    inputs = PROMPTS["padded"].inputs(vlm)
    half = inputs | {"pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    for is_late in (False, True):
        model = vlm.make("sdpa")
        if not is_late:
            model.to(torch.bfloat16)
        torch.manual_seed(0)
        with attach(model, METHODS[name]):
            if is_late:
                model(**inputs)
                model.to(torch.bfloat16)
                torch.manual_seed(0)
            found.append(model(**half).logits)
    assert torch.equal(*found)
