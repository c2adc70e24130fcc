"""Text merged at the root: fewer tokens, the same attention, and nothing where there is no such text."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import IdentityProcessor, TurboProcessor, attach
from gen_turbo.hosts.text import merge_text
from tests import tiny_transformers
from tests.hosts.families import Keys, family, relative
from tests.snapshots import differences, model_state
from tests.tiny_transformers import FAMILIES, random


def _padded(name: str, batch: int, with_zeros: bool) -> dict[str, object]:
    """Inputs with 4 words and 12 equal padding tokens."""
    inputs = FAMILIES[name].inputs(batch, (8, 8))
    words = random(batch, 4, 32)
    padding = torch.zeros(batch, 12, 32) if with_zeros else random(1, 1, 32, seed=5).expand(batch, 12, -1)
    extra = {"txt_ids": torch.zeros(16, 3)} if "txt_ids" in inputs else {}
    return {**inputs, **extra, "encoder_hidden_states": torch.cat([words, padding], 1)}


def _run(name: str, model: torch.nn.Module, inputs: dict[str, object], batch: int) -> torch.Tensor:
    latents = random(batch, *FAMILIES[name].latents((8, 8)))
    with torch.no_grad():
        steps = [FAMILIES[name].time(time, batch) for time in (900, 700)]
        outputs = [model(hidden_states=latents, **inputs, **step, return_dict=False)[0] for step in steps]
    return torch.stack(outputs)


@pytest.mark.parametrize("name", ["sd3", "sd3.5-dual", "flux"])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_padding_merges_without_loss(name, with_zeros, batch):
    """Catches merged padding that counts once, words that merge before padding, and sizes at the image's keys."""
    model = tiny_transformers.build(name)
    inputs = _padded(name, batch, with_zeros)
    with Keys() as stock_keys:
        stock = _run(name, model, inputs, batch)
    with attach(model, IdentityProcessor(0.4, text_ratio=0.5)), Keys() as keys:
        short = _run(name, model, inputs, batch)
    assert max(k for _, k in stock_keys.seen) - max(k for _, k in keys.seen) == 8
    assert not torch.equal(short, stock) and relative(short, stock) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"scope": "block"}, {"size_weighted": True}, {"keep_queries": True}])
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
    short = merge_text({"text": torch.cat([words, padding], 1)}, ("text",), 0.5)
    assert short.num_text == 8 and sorted(short.sizes[0].tolist())[:4] == [1, 1, 1, 1]
    assert short.sizes.sum() == 16
    kept = short.arguments["text"][0]
    for word in words[0]:
        assert (kept - word).abs().amax(1).min() < 1e-6


def test_it_is_made_once_per_prompt(monkeypatch):
    """Catches matching the text anew in every step."""
    from gen_turbo.hosts import denoiser

    made = []
    monkeypatch.setattr(denoiser, "merge_text", lambda *args: made.append(1) or merge_text(*args))
    model = tiny_transformers.build("sd3")
    with attach(model, IdentityProcessor(text_ratio=0.5)):
        _run("sd3", model, _padded("sd3", 1, True), 1)
    assert len(made) == 1


@pytest.mark.parametrize("name", ["sd15", "pixart-alpha", "wan"])
def test_models_without_such_text_refuse(name):
    """Catches a setting that is silent where text is in cross-attention."""
    model, _ = family(name)
    with pytest.raises(ValueError, match=r"text_ratio=0.5 has no text tokens to merge in .*; leave it 0"):
        attach(model, TurboProcessor(0.4, text_ratio=0.5))
