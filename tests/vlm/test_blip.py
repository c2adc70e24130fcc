"""BLIP, BLIP-2 and InstructBLIP: the published merging by value, text that reads fewer tokens, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
)

from gen_turbo import IdentityProcessor, RandomProcessor, TurboProcessor, attach, report
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm import tower_oracle
from tests.vlm.tiny_kit import PAD, TEXT, VISION, pixels, ready

TOLERANCE = 1e-4
PUBLISHED = TurboVisionProcessor(num_removed=3, alpha=0.5)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": PAD}
SMALL = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}


def _blip(model):
    text = {**SMALL, **SPECIAL, "num_hidden_layers": 2, "encoder_hidden_size": 32, "max_position_embeddings": 64}
    return ready(model(BlipConfig(text_config=text, vision_config={**VISION}, image_text_hidden_size=32)))


def _queries(model, config):
    queries = {**SMALL, "num_hidden_layers": 2, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    text = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, word_embed_proj_dim=32,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    made = config(vision_config={**VISION}, qformer_config=queries, text_config=text, num_query_tokens=4)
    made.image_token_index = made.image_token_id = 99
    return ready(model(made))


MODELS = {
    "caption": lambda: _blip(BlipForConditionalGeneration),
    "vqa": lambda: _blip(BlipForQuestionAnswering),
    "retrieval": lambda: _blip(BlipForImageTextRetrieval),
    "blip2": lambda: _queries(Blip2ForConditionalGeneration, Blip2Config),
    "instructblip": lambda: _queries(InstructBlipForConditionalGeneration, InstructBlipConfig),
}
PLACES = [PUBLISHED, TurboVisionProcessor(0.5), TurboProcessor(0.5), Placed(RandomProcessor(0.5), combine="prune")]


@torch.no_grad()
def run(name, model):
    """What the text side gives for two images."""
    images, ids = pixels(2), torch.tensor([[1, 5, 6], [1, 7, 8]])
    if name in ("blip2", "instructblip"):
        ids = torch.tensor([[99] * 4 + [1, 5, 6], [99] * 4 + [1, 7, 8]])
        more = {"qformer_input_ids": torch.tensor([[5, 6], [7, 8]])} if name == "instructblip" else {}
        return model(pixel_values=images, input_ids=ids, **more).logits
    if name == "retrieval":
        return model(pixel_values=images, input_ids=ids).itm_score
    kwargs = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    out = model.generate(pixel_values=images, input_ids=ids, **kwargs)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("processor", PLACES, ids=["published", "ratio", "pre_llm", "random"])
def test_the_text_side_reads_the_merged_tokens(name, processor):
    """Catches a tower that is restored, a mask of the old length, and tokens other than the tower's."""
    model = MODELS[name]()
    stock = run(name, model)
    with attach(model, processor):
        shorter = model.vision_model(pixels(2)).last_hidden_state
        reduced = run(name, model)
    handle = model.vision_model.register_forward_hook(lambda m, a, out: out.__setitem__("last_hidden_state", shorter))
    expected = run(name, model)
    handle.remove()
    assert shorter.shape[1] == 1 + (16 - 9 if processor is PUBLISHED else 8)
    assert (reduced - expected).abs().max() < TOLERANCE
    assert (reduced - stock).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["caption", "blip2"])
def test_the_published_algorithm_by_value(name):
    """Catches another score, split or order than the paper's, and keys of merged tokens that weigh as one."""
    model = MODELS[name]()
    tower = model.vision_model
    with torch.no_grad():
        x = tower.embeddings(pixels(2))
        with attach(model, PUBLISHED):
            merged = tower(pixels(2)).last_hidden_state
        for row in range(2):
            tokens, _, members = tower_oracle.encode(x[row], tower.encoder.layers, 1, 3, 15.0)
            order = sorted(range(len(members)), key=lambda slot: min(members[slot], key=lambda t: (t % 2 == 0, t)))
            assert sorted(order) == list(range(merged.shape[1]))
            assert (merged[row] - tower.post_layernorm(tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_nothing_merged_is_bit_identical_and_detach_exact(name):
    """Catches attention of our own where nothing merged, and a `forward` left on an instance."""
    model = MODELS[name]()
    stock, before = run(name, model), model_state(model)
    for processor in (TurboVisionProcessor(0.0), IdentityProcessor(0.5), Placed(IdentityProcessor(), place="tower")):
        with attach(model, processor):
            assert torch.equal(run(name, model), stock)
    with attach(model, PUBLISHED):
        run(name, model)
        assert len([row for row in report(model).layers if row.num_reduced]) == 3
    with pytest.raises(RuntimeError), attach(model, PUBLISHED):
        model.vision_model(pixels(2)[:, :2])
    assert differences(before, model_state(model)) == []


def test_a_decoder_cut_is_refused():
    """Catches a cut that would silently do nothing."""
    with pytest.raises(ValueError, match="no image tokens in its prompt"):
        attach(MODELS["caption"](), Placed(TurboProcessor(0.5), place="decoder"))
