"""Llama 3.2 Vision, whose language model reads tiles by cross-attention: answers, masks, caches, refusals."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import MllamaForConditionalGeneration

from gen_turbo import RandomProcessor, TurboProcessor, attach, report
from gen_turbo.methods.divprune import DivPruneProcessor
from gen_turbo.methods.fastv import FastVProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm.oracle import reduce_row
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.tiny_mllama import mllama, mllama_inputs


@dataclass
class Shorter:
    """A stock model whose tower gives tiles reduced one by one, and whose masks are made for these.

    The projector is linear, so that what is merged before it is merged behind it.
    """

    model: MllamaForConditionalGeneration
    method: TurboProcessor
    is_merged: bool = True

    def generate(self, given, **settings):
        """What the model then gives."""
        base = self.model.model
        tower, length = base.vision_model, base.vision_model.num_patches
        encode, kept = tower.forward, self.method.plan_tokens(torch.randn(1, length - 1, 32), grid=(4, 4)).num_slots

        def encoded(**kwargs):
            tower.num_patches = length
            out, tiles = encode(**kwargs), []
            tower.num_patches = 1 + kept
            for tile in out.last_hidden_state.flatten(0, 2):
                plan = self.method.plan_tokens(base.multi_modal_projector(tile)[None, 1:], grid=(4, 4))
                tiles.append(torch.cat([tile[:1], reduce_row(tile[1:], plan, self.is_merged)]))
            out.last_hidden_state = torch.stack(tiles).unflatten(0, out.last_hidden_state.shape[:3])
            return out

        tower.forward = encoded
        try:
            return generate(self.model, given, **settings)
        finally:
            del tower.forward
            tower.num_patches = length


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [TurboProcessor(0.6, semantic="none"), DivPruneProcessor(0.6)])
def test_answers_are_those_of_shorter_tiles(method, attention):
    """Catches a mask that is not of the tokens left, in the prompt or while words are made, and class tokens merged."""
    model, given = mllama(attention), mllama_inputs()
    with attach(model, method):
        tokens, logits, _ = generate(model, given)
        row = next(row for row in report(model).layers if row.status == "reduced")
        assert (row.num_tokens, row.num_kept) == (64, 64 - 4 * 9)
    expected = Shorter(model, method, isinstance(method, TurboProcessor)).generate(given)
    assert torch.equal(tokens, expected[0]) and (logits - expected[1]).abs().max() < TOLERANCE
    assert (logits[:, 0] - generate(model, given)[1][:, 0]).abs().max() > 100 * TOLERANCE


def test_beams_and_no_cache_give_the_same():
    """Catches masks that follow from a cache where there is none, and keys that stay behind where beams change rows."""
    model, given, method = mllama(), mllama_inputs(), TurboProcessor(0.6, semantic="none")
    for settings in ({"num_beams": 3}, {"use_cache": False}):
        with attach(model, method):
            tokens = generate(model, given, **settings)[0]
        assert torch.equal(tokens, Shorter(model, method).generate(given, **settings)[0])


def test_words_alone_pass():
    """Catches a mask that is cut by the keys of an image where none came."""
    model, given = mllama(), mllama_inputs()
    words = {name: given[name] for name in ("input_ids", "attention_mask")}
    for more in ({}, {"cross_attention_mask": given["cross_attention_mask"]}):
        stock = model(**words, **more).logits
        with attach(model, TurboProcessor(0.5)):
            assert torch.equal(model(**words, **more).logits, stock)


@pytest.mark.parametrize("method", [TurboProcessor(0.0), RandomProcessor(0.0)])
def test_nothing_removed_is_bit_identical_and_detach_exact(method):
    """Catches a stage that computes even the identity another way, and hooks that stay."""
    model, given = mllama(), mllama_inputs()
    stock = [generate(model, given, **settings)[1] for settings in ({}, {"cache_implementation": "static"})]
    before = model_state(model)
    with attach(model, method):
        assert torch.equal(generate(model, given)[1], stock[0])
        assert torch.equal(generate(model, given, cache_implementation="static")[1], stock[1])
    assert differences(before, model_state(model)) == []


def test_what_cannot_work_is_refused():
    """Catches places that read a prompt or tower there is none of, and a static cache with places for whole images."""
    model, given = mllama(), mllama_inputs()
    for method in (
        TurboVisionProcessor(0.5, place="tower"),
        Placed(TurboProcessor(0.5), place="decoder"),
        FastVProcessor(0.5),
        TurboProcessor(0.5, text_ratio=0.5),
        TurboProcessor(0.5, proportional_attention=True),
    ):
        with pytest.raises(ValueError, match="Mllama"):
            attach(model, method)
    with attach(model, TurboProcessor(0.5)), pytest.raises(ValueError, match="static cache"):
        generate(model, given, cache_implementation="static")
