"""Words merged in BLIP's text encoder: by a slow loop, with padding, and refused where text is causal."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import IdentityProcessor, TurboProcessor, attach, report
from gen_turbo.api import NoEffectWarning
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.stride import StrideProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm.test_blip import MODELS, TOLERANCE
from tests.vlm.tiny_kit import pixels

IDS = torch.tensor([[1, 11, 12, 13, 14, 15, 16, 17, 2, 0, 0], [1, 21, 22, 23, 24, 25, 26, 27, 28, 29, 2]])
LENGTHS = (9, 11)
MASK = torch.tensor([[1] * 9 + [0] * 2, [1] * 11])
REMOVED = 3  # int(0.5 * 7 words of the shorter row)
METHODS = {
    "turbo": TurboProcessor(0.0, text_ratio=0.5, value_weight=0.5),
    "class": TurboVisionProcessor(0.0, text_ratio=0.5, place="pre_llm", value_weight=5.0),
    "stride": StrideProcessor(0.0, text_ratio=0.5),
}


def _attention(layer, x, mask):
    """Attention maps (H, n, n) of a layer's own projections for one row (n, C), masked additively."""
    own = layer.attention.self
    heads = (len(x), own.num_attention_heads, -1)
    query, key = (linear(x).view(heads).transpose(0, 1) for linear in (own.query, own.key))
    return (query @ key.transpose(1, 2) / own.attention_head_size**0.5 + mask).softmax(-1)


def _slow(model, reducer, images):
    """What the encoder gives for each row, padding left out: layer 0 on all words, then one loop over slots."""
    encoder, outputs = model.text_encoder, []
    for ids, length, image in zip(IDS, LENGTHS, images, strict=True):
        row = encoder.embeddings(ids[None, :length])
        ones = torch.ones(1, image.shape[0])
        layers = list(encoder.encoder.layer)
        look = _attention(layers[0], row[0], torch.zeros(length)).mean(0)
        none, cross = torch.zeros(1, 1, 1, length), (1 - ones)[:, None, None]
        row = layers[0](row, image[None], attention_mask=none, encoder_attention_mask=cross)[0]
        value = {"class": look[0, 1:-1], "self": look[:, 1:-1].mean(0)}
        seen = {kind: (one / one.sum())[None] for kind, one in value.items()}
        words = length - 2
        site = LayerInfo("text", (REMOVED + 0.5) / words, semantic=seen.get)
        slots = reducer.plan(row[None, 1:-1], site, StepInfo()).slot_BN[0].tolist()
        members = [[0], *([1 + w for w in range(words) if slots[w] == s] for s in range(max(slots) + 1)), [length - 1]]
        hidden = torch.stack([torch.stack([row[m] for m in member]).mean(0) for member in members])[None]
        sizes = torch.tensor([float(len(member)) for member in members]).log()[None, None, None]
        for layer in layers[1:]:
            hidden = layer(hidden, image[None], attention_mask=sizes, encoder_attention_mask=cross)
        outputs.append((hidden[0], members))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("name", ["vqa", "retrieval"])
@pytest.mark.parametrize("method", METHODS)
def test_words_merge_as_a_slow_loop_merges_them(name, method):
    """Catches padding that merges with words, sizes that do not count, and values of other words."""
    model, reducer = MODELS[name](), METHODS[method]
    images = model.vision_model(pixels(2)).last_hidden_state
    ones = torch.ones(images.shape[:2])
    with attach(model, reducer):
        out = model.text_encoder(IDS, MASK, encoder_hidden_states=images, encoder_attention_mask=ones)
        rows = {row.name: (row.num_tokens, row.num_kept) for row in report(model).layers}
    assert rows["text_encoder"] == (11, 11 - REMOVED)
    for got, (expected, members) in zip(out.last_hidden_state, _slow(model, reducer, images), strict=True):
        # Slots stand in the order of their anchors, which a mean does not tell; each is found once.
        distance = torch.cdist(got[: len(members)], expected)
        order = distance.argmin(0)
        assert sorted(order.tolist()) == list(range(len(members)))
        assert distance.amin(0).max() < TOLERANCE
        assert order[0] == 0 and order[-1] == len(members) - 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["vqa", "retrieval"])
def test_answers_change_and_come_back(name):
    """Catches words that merge in vain, hooks that stay, and a ratio of 0 that is not the stock model."""
    model, images = MODELS[name](), pixels(2)

    def run():
        if name == "retrieval":
            return model(pixel_values=images, input_ids=IDS, attention_mask=MASK).itm_score
        kwargs = {"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(pixel_values=images, input_ids=IDS, attention_mask=MASK, do_sample=False, **kwargs)
        return torch.stack(out.logits, 1)

    stock, before = run(), model_state(model)
    with attach(model, TurboProcessor(0.0, text_ratio=0.5)):
        assert (run() - stock).abs().max() > 100 * TOLERANCE
    for reducer in (TurboProcessor(0.0), IdentityProcessor(0.5, text_ratio=0.5)):
        with attach(model, reducer):
            assert torch.equal(run(), stock)
    with attach(model, TurboProcessor(0.0, text_ratio=0.1)), pytest.warns(NoEffectWarning, match="texts of 7 words"):
        assert torch.equal(run(), stock)
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize("model", [MODELS["caption"], MODELS["blip2"]])
@pytest.mark.parametrize("place", ["pre_llm", "tower"])
def test_causal_text_without_a_gate_is_refused(model, place):
    """Catches a setting that is ignored in silence."""
    with pytest.raises(ValueError, match="text that is read in both directions"):
        attach(model(), Placed(TurboProcessor(0.5, text_ratio=0.5), place=place))
