"""Text merged at the root: fewer tokens, the same attention, and nothing where there is no such text.

The prompts here have 4 words and 12 tokens of padding.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.engine.text import merge_text
from gen_turbo.models.conditions import TextSignature
from tests import tiny_transformers
from tests.engine.families import Keys, family, relative
from tests.snapshots import differences, model_state
from tests.tiny_transformers import FAMILIES, random

TAKING = (
    "sd3",
    "sd3.5-dual",
    "flux",
    "aura-flow",
    "chroma",
    "cogview3plus",
    "cogview4",
    "cogvideox-rotary",
    "hunyuan-video",
)


def _padded(name: str, batch: int, with_zeros: bool) -> dict[str, object]:
    """Inputs with 4 words and 12 equal padding tokens, which differ where a mask hides them."""
    inputs = FAMILIES[name].inputs(batch, (8, 8))
    words = random(batch, 4, 32)
    padding = torch.zeros(batch, 12, 32) if with_zeros else random(1, 1, 32, seed=5).expand(batch, 12, -1)
    extra: dict[str, object] = {"txt_ids": torch.zeros(16, 3)} if "txt_ids" in inputs else {}
    is_word = (torch.arange(16) < 4).repeat(batch, 1)
    if name == "chroma":
        extra["attention_mask"] = torch.cat([is_word.float(), torch.ones(batch, 64)], 1)
    if name == "hunyuan-video":
        extra["encoder_attention_mask"], padding = is_word.long(), random(batch, 12, 32, seed=5)
    return {**inputs, **extra, "encoder_hidden_states": torch.cat([words, padding], 1)}


def _run(name: str, model: torch.nn.Module, inputs: dict[str, object], batch: int) -> torch.Tensor:
    latents = random(batch, *FAMILIES[name].latents((8, 8)))
    with torch.no_grad():
        steps = [FAMILIES[name].time(time, batch) for time in (900, 700)]
        outputs = [model(hidden_states=latents, **inputs, **step, return_dict=False)[0] for step in steps]
    return torch.stack(outputs)


@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_padding_merges_without_loss(name, batch):
    """Catches merged padding that counts once, words that merge before padding, and sizes at the image's keys."""
    model = tiny_transformers.build(name)
    inputs = _padded(name, batch, batch == 1)
    with Keys() as stock_keys:
        stock = _run(name, model, inputs, batch)
    with attach(model, IdentityProcessor(0.4, text_ratio=0.5)), Keys() as keys:
        short = _run(name, model, inputs, batch)
    assert max(k for _, k in stock_keys.seen) - max(k for _, k in keys.seen) == 8
    assert relative(short, stock) < 1e-5


@pytest.mark.parametrize("name", TAKING)
def test_what_repeats_merges_unasked(name):
    """Catches padding that is only merged on demand, words lost to it, and a default that identity has too."""
    model = tiny_transformers.build(name)
    inputs = _padded(name, 2, False)
    counts = []
    for processor in (TurboProcessor(0.0, text_ratio=None), TurboProcessor(0.4, text_ratio=0.0), TurboProcessor(0.4)):
        with attach(model, processor), Keys() as keys:
            _run(name, model, inputs, 2)
        counts.append(max(k for _, k in keys.seen))
    with Keys() as keys:
        stock = _run(name, model, inputs, 2)
    with attach(model, IdentityProcessor(0.4)):
        assert torch.equal(_run(name, model, inputs, 2), stock)
    full = max(k for _, k in keys.seen)
    assert counts == [full, full, full - 11]


def test_text_that_does_not_repeat_is_left_as_it_is():
    """Catches sizes of one that cost every attention call, and another result than without the setting."""
    model = tiny_transformers.build("sd3")
    inputs = FAMILIES["sd3"].inputs(2, (8, 8))
    outputs = []
    for ratio in (None, 0.0):
        with attach(model, TurboProcessor(0.4, text_ratio=ratio)):
            outputs.append(_run("sd3", model, inputs, 2))
            assert report(model).text_tokens == (0, 0)
    assert torch.equal(*outputs)


def test_the_report_counts_text():
    """Catches a default that works unseen, and FLOPs that leave the merged text out of the stock model's."""
    model, saved = tiny_transformers.build("flux"), []
    for ratio in (None, 0.0):
        with attach(model, TurboProcessor(0.4, restore="copy", text_ratio=ratio)):
            _run("flux", model, _padded("flux", 1, True), 1)
            result = report(model)
        saved.append((result.flops_saved, sum(layer.stock_flops for layer in result.layers)))
    assert saved[0][0] > saved[1][0] + 0.05 and saved[0][1] == saved[1][1]
    with attach(model, TurboProcessor(0.4)):
        _run("flux", model, _padded("flux", 1, True), 1)
        assert report(model).text_tokens == (16, 5) and "text: 16 -> 5 tokens" in str(report(model))


class Formula(JointAttnProcessor2_0):
    """Joint attention by its formula, without a kernel of PyTorch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return hidden_states, encoder_hidden_states


def test_attention_that_cannot_be_weighed_stops_it():
    """Catches merged text at layers that no longer weigh it: asked for it is an error, unasked it stays in full."""
    model = tiny_transformers.build("sd3")
    inputs = _padded("sd3", 1, True)
    stock = model.transformer_blocks[1].attn.processor
    for ratio in (None, 0.5):
        with attach(model, TurboProcessor(0.4, restore="copy", text_ratio=ratio)), Keys() as keys:
            model.transformer_blocks[1].attn.set_processor(Formula())
            if ratio is None:
                _run("sd3", model, inputs, 1)
                assert max(k for _, k in keys.seen) == 64 - 25 + 16
            else:
                with pytest.raises(ValueError, match=r"text cannot be weighed at transformer_blocks.1.attn"):
                    _run("sd3", model, inputs, 1)
        model.transformer_blocks[1].attn.set_processor(stock)


@pytest.mark.parametrize("settings", [{}, {"scope": "block"}, {"proportional_attention": True}, {"kv_only": True}])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_it_goes_with_every_other_setting(name, settings):
    """Catches text rows that are counted as before."""
    model = tiny_transformers.build(name)
    inputs = _padded(name, 2, False)
    stock = _run(name, model, inputs, 2)
    before = model_state(model)
    outputs = []
    for ratio in (0.0, 0.5):
        with attach(model, TurboProcessor(0.4, restore="copy", text_ratio=ratio, **settings)):
            outputs.append(_run(name, model, inputs, 2))
    assert differences(before, model_state(model)) == []
    assert 0 < relative(outputs[0], stock) < 0.5
    assert not torch.equal(*outputs) and relative(*outputs) < 0.05


def test_words_stay_apart():
    """Catches a plan by place instead of likeness: distinct words keep a token of their own."""
    words, padding = random(1, 4, 32), torch.zeros(1, 12, 32)
    short = merge_text({"text": torch.cat([words, padding], 1)}, TextSignature("text"), 0.5)
    assert short.num_text == 8 and sorted(short.sizes[0].tolist())[:4] == [1, 1, 1, 1]
    assert short.sizes.sum() == 16
    kept = short.arguments["text"][0]
    for word in words[0]:
        assert (kept - word).abs().amax(1).min() < 1e-6


def test_it_is_made_once_per_prompt(monkeypatch):
    """Catches matching the text anew in every step."""
    from gen_turbo.engine import prefix

    made = []
    monkeypatch.setattr(prefix, "merge_text", lambda *args: made.append(1) or merge_text(*args))
    model = tiny_transformers.build("sd3")
    with attach(model, IdentityProcessor(text_ratio=0.5)):
        _run("sd3", model, _padded("sd3", 1, True), 1)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sd15", "its text is in cross-attention"),
        ("wan", "its image tokens share no attention with text"),
        ("qwen-image", "it gives text its positions inside"),
        ("cogvideox", "its table of positions fixes the length of the text"),
        ("mochi", "its attention drops padding by itself"),
    ],
)
def test_models_without_such_text_refuse(name, why):
    """Catches a setting that is silent where text is in cross-attention, and a refusal that does not say why."""
    model, _ = family(name)
    with pytest.raises(ValueError, match=rf"text_ratio=0.5 has no text tokens to merge in .*: {why}; leave it out"):
        attach(model, TurboProcessor(0.4, text_ratio=0.5))
    attach(model, TurboProcessor(0.4)).detach()


def test_masks_keep_tokens_apart():
    """Catches a word and a token of another mask on one slot, and hidden tokens told apart by what nobody reads."""
    text = random(1, 8, 8)
    text[:, 4] = text[:, 0]
    shown = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    given = {"encoder_hidden_states": text, "mask": shown}
    short = merge_text(given, TextSignature(mask="mask", hides=True), None)
    assert short.arguments["mask"].tolist() == [[1, 1, 1, 0]] and short.sizes.tolist() == [[1, 1, 1, 5]]
    assert merge_text(given, TextSignature(mask="mask"), None).num_merged == 0
