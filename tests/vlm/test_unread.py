"""Blocks of a tower that nothing reads are left out of answers, and of nothing else."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import PARProcessor, TurboProcessor, attach
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.vlm.unread import Unread
from tests.snapshots import differences, model_state
from tests.vlm.test_generate import generate
from tests.vlm.tiny_vlms import PROMPTS, VLMS

METHODS = {
    "gate": TurboProcessor(0.6),
    "tower": TurboVisionProcessor(0.6),
    "routed": PARProcessor(router="uniform", tokens=0.5, layers=3),
}


class Ran:
    """Which blocks of a tower attended, in order."""

    def __init__(self, model):
        self.blocks = []
        for index, block in enumerate(model.model.vision_tower.encoder.layers):
            block.self_attn.register_forward_hook(lambda *given, index=index: self.blocks.append(index))

    def __call__(self):
        ran, self.blocks = self.blocks, []
        return ran


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
@torch.no_grad()
def test_answers_are_those_of_the_whole_tower(family, method, monkeypatch):
    """Catches a block that is read left out, answers from another state, and a call or an answer that runs all."""
    model, inputs = VLMS[family].make("sdpa"), PROMPTS["padded"].inputs(VLMS[family])
    ran = Ran(model)
    with attach(model, METHODS[method]):
        logits = model(**inputs).logits
        assert ran() == [0, 1]
        answer = generate(model, inputs)[1]
        assert ran() == [0, 1]
    monkeypatch.setattr(Unread, "place", lambda stage, model: iter(()))
    with attach(model, METHODS[method]):
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(generate(model, inputs)[1], answer)
        assert ran() == [0, 1, 2] * 2


@torch.no_grad()
def test_who_asks_for_features_has_every_block():
    """Catches a last state that is another block's, and a block left out of a call that names it."""
    model, inputs = VLMS["llava"].make("sdpa"), PROMPTS["one"].inputs(VLMS["llava"])
    ran, last = Ran(model), {"vision_feature_layer": -1}
    stock = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    named = model(**inputs, **last).logits
    ran()
    with attach(model, TurboProcessor(0.6)):
        assert torch.equal(model.get_image_features(inputs["pixel_values"]).last_hidden_state, stock)
        reduced = model(**inputs, **last).logits
        generate(model, inputs, **last)
        model.model.vision_tower(inputs["pixel_values"])
    assert ran() == [0, 1, 2] * 4 and not torch.equal(reduced, named)
    with attach(model, TurboProcessor(0.0)):
        assert torch.equal(model(**inputs, **last).logits, named)
        model(**inputs)
    assert ran() == [0, 1, 2] * 2


@torch.no_grad()
def test_an_answer_that_fails_has_every_block_after_it():
    """Catches a model that goes on leaving blocks out, and methods that stay."""
    model, inputs = VLMS["llava"].make("sdpa"), PROMPTS["one"].inputs(VLMS["llava"])
    generate(model, inputs)
    ran, before = Ran(model), model_state(model)
    with attach(model, TurboProcessor(0.6)):
        with pytest.raises(ValueError, match="[Ii]mage"):
            generate(model, {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
        ran()
        model.get_image_features(inputs["pixel_values"])
        assert ran() == [0, 1, 2]
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize(("layer", "used"), [([-2, 1], [0, 1]), ([1, -3], [0]), (3, [0, 1, 2]), (-1, [0, 1, 2])])
@torch.no_grad()
def test_the_last_block_that_is_read_is_known(layer, used):
    """Catches the largest number taken for the last block where some count from the end."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    model.config.vision_feature_layer = layer
    if isinstance(layer, list):
        projector = model.model.multi_modal_projector
        projector.linear_1 = torch.nn.Linear(64, projector.linear_1.out_features)
    ran = Ran(model)
    with attach(model, TurboProcessor(0.6)):
        model(**inputs)
    assert ran() == used
