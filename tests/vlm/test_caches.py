"""Caches, recorded outputs, kernels and inputs of every kind: as with the default cache, or refused in words."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Cache, QuantizedCache
from transformers.cache_utils import Fp8QuantizedLayer

import gen_turbo
from gen_turbo import PARProcessor, TurboProcessor, attach
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.vlm.cache_argument import CACHE, cache_in
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.tiny_kit import IMAGE
from tests.vlm.tiny_vlms import PROMPTS, VLMS

SHORT = {"pre_llm": TurboProcessor(0.6), "decoder": Placed(TurboProcessor(0.6), place="decoder")}

UNCUT = [family for family, vlm in VLMS.items() if not vlm.cuts]
SLIDING = [family for family in UNCUT if family != "mistral_large4"]


@pytest.mark.parametrize("family", UNCUT)
@pytest.mark.parametrize("method", [SHORT["decoder"], PARProcessor(router="uniform", tokens=0.5, layers=3)])
def test_what_sliding_windows_cannot_is_refused_by_attach(family, method):
    """Catches a cut that leaves the masks of windows as long as the prompt, and columns chosen before it."""
    model = VLMS[family].make()
    before = model_state(model)
    with pytest.raises(
        ValueError, match="has (layers with sliding windows, whose masks|recurrent layers|layers that sha)"
    ):
        attach(model, method)
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", ["one", "padded", "ragged_padded"])
@pytest.mark.parametrize("family", VLMS)
def test_a_static_cache_gives_what_the_dynamic_one_gives(family, prompt, attention):
    """Catches a cache that holds the tokens at the places of the whole prompt, and a mask of the wrong columns."""
    if attention == "eager" and family not in ("llava", "paligemma"):
        return
    vlm = VLMS[family]
    model, inputs = vlm.make(attention), PROMPTS[prompt].inputs(vlm)
    with attach(model, TurboProcessor(0.6, semantic="none")):
        new, expected, _ = generate(model, inputs)
        if family in SLIDING:
            with pytest.raises(ValueError, match="StaticCache with (sliding windows|recurrent layers)"):
                generate(model, inputs, cache_implementation="static")
            return
        again, logits, out = generate(model, inputs, cache_implementation="static")
    assert torch.equal(new, again) and (logits - expected).abs().max() < TOLERANCE
    layer = cache_in(out).layers[0]
    assert int(layer.cumulative_length) < inputs["input_ids"].shape[1]
    assert int(cache_in(out).get_seq_length()) == inputs["input_ids"].shape[1] + logits.shape[1] - 1


@pytest.mark.parametrize("place", SHORT)
@pytest.mark.parametrize("family", ["llava", "qwen2_5"])
def test_a_quantized_cache_holds_what_the_dynamic_one_holds(family, place, monkeypatch):
    """Catches a quantized cache that counts in columns; what quantizing itself loses is taken away."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    monkeypatch.setattr(Fp8QuantizedLayer, "_quantize", lambda layer, x, scale=None: (x, torch.ones(())))
    monkeypatch.setattr(Fp8QuantizedLayer, "_dequantize", lambda layer, pair: pair[0])
    with attach(model, SHORT[place]):
        new, expected, _ = generate(model, inputs)
        cache = QuantizedCache(backend="fp8", config=model.config.get_text_config())
        again, logits, out = generate(model, inputs, **{CACHE: cache})
    assert torch.equal(new, again) and (logits - expected).abs().max() < TOLERANCE
    assert cache_in(out).num_held(3) < inputs["input_ids"].shape[1] <= cache_in(out).get_seq_length()


@pytest.mark.parametrize("place", SHORT)
def test_beams_reorder_what_is_quantized(place, monkeypatch):
    """Catches rows that beam search reorders in the recent keys of a quantized cache alone."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    monkeypatch.setattr(Fp8QuantizedLayer, "_quantize", lambda layer, x, scale=None: (x, torch.ones(())))
    monkeypatch.setattr(Fp8QuantizedLayer, "_dequantize", lambda layer, pair: pair[0])
    beams = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    with attach(model, SHORT[place]):
        expected = model.generate(**inputs, **beams)
        cache = QuantizedCache(backend="fp8", config=model.config.get_text_config())
        assert torch.equal(model.generate(**inputs, **beams, **{CACHE: cache}), expected)


class _Stream(contextlib.nullcontext):
    """Stands in for a stream of a device where there is none."""

    def wait_stream(self, other):
        """Waits for nothing."""


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("method", [*SHORT.values(), PARProcessor(router="uniform", tokens=0.5, layers=3)])
def test_an_offloaded_cache_gives_what_the_dynamic_one_gives(method, cache, monkeypatch):
    """Catches a cache that is no longer offloaded once tokens are dropped, and layers without keys that are fetched."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _Stream())
    left = []
    stock = Cache.offload
    monkeypatch.setattr(Cache, "offload", lambda *args: (left.append(args[1]), stock(*args)))
    with attach(model, method):
        new, expected, _ = generate(model, inputs)
        if cache == "offloaded_static" and method is not SHORT["pre_llm"]:
            with pytest.raises(ValueError, match="StaticCache"):
                generate(model, inputs, cache_implementation=cache)
            return
        again, logits, _ = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(new, again) and (logits - expected).abs().max() < TOLERANCE
    assert len(left) >= 3 * len(model.model.language_model.layers) - 3


@pytest.mark.parametrize("family", ["llava", "qwen2", "qwen2_5", "internvl"])
def test_a_cut_with_a_static_cache_runs_where_nothing_leaves_and_is_refused_before_the_prompt_runs(family):
    """Catches an AttributeError where nothing is removed, and a refusal after the whole prompt has run."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    stock = generate(model, inputs, cache_implementation="static")[1]
    with attach(model, Placed(TurboProcessor(0.0), place="decoder")):
        assert torch.equal(generate(model, inputs, cache_implementation="static")[1], stock)
    ran = []
    model.get_submodule(vlm.text).layers[0].register_forward_pre_hook(lambda m, a: ran.append(m))
    with attach(model, SHORT["decoder"]), pytest.raises(ValueError, match="StaticCache"):
        generate(model, inputs, cache_implementation="static")
    assert not ran


def test_a_second_turn_with_a_image_goes_on_in_a_static_cache():
    """Catches places of the second turn counted from the whole first prompt."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    more = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    turn = torch.tensor([[5, 6] + [IMAGE] * 16 + [7]] * 3)
    found = []
    for settings in ({}, {CACHE: "static"}):
        with attach(model, TurboProcessor(0.6, semantic="none")):
            if settings:
                from transformers import StaticCache

                settings = {CACHE: StaticCache(model.config.get_text_config(), max_cache_len=120)}
            first = generate(model, inputs, **settings)[2]
            ids = torch.cat([first.sequences, turn], 1)
            grown = torch.ones(3, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
            mask = torch.cat([inputs["attention_mask"], grown], 1)
            new = {"input_ids": ids, "attention_mask": mask, "pixel_values": more}
            found.append(generate(model, new, **{CACHE: cache_in(first)})[1])
    assert (found[0] - found[1]).abs().max() < TOLERANCE


def test_compiled_decoding_with_a_static_cache():
    """Catches decode steps that compile anew for every token, and ones that forget what the prompt dropped."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    counts = []

    def counted(module, given):
        counts.append(1)
        return module.forward

    with attach(model, TurboProcessor(0.6, semantic="none")):
        expected = generate(model, inputs, cache_implementation="static", max_new_tokens=8)[1]
        stock_call = model.get_compiled_call
        compiled = torch.compile(model.__call__, backend=counted)
        model.get_compiled_call = lambda config: compiled
        model._valid_auto_compile_criteria = lambda kwargs, config: True
        try:
            first = generate(model, inputs, cache_implementation="static", max_new_tokens=4)[1]
            known = len(counts)
            found = generate(model, inputs, cache_implementation="static", max_new_tokens=8)[1]
        finally:
            del model.get_compiled_call, model._valid_auto_compile_criteria
    torch._dynamo.reset()
    assert stock_call and known > 0 and (first - expected[:, :4]).abs().max() < TOLERANCE
    assert (found - expected).abs().max() < TOLERANCE
    assert len(counts) <= 2 * known


@pytest.mark.parametrize("place", [*SHORT, "par"])
@pytest.mark.parametrize("prompt", ["one", "ragged_padded"])
def test_a_cache_that_outlives_its_attachment_says_so(place, prompt):
    """Catches a second turn, after detaching, on columns that stand elsewhere than the model thinks."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    par = PARProcessor(router="uniform", tokens=0.5, layers=3)
    attachment = attach(model, SHORT.get(place, par))
    caches = [generate(model, inputs)[2]]
    if place == "pre_llm":
        caches.append(generate(model, inputs, cache_implementation="static", max_new_tokens=3)[2])
    rows = len(inputs["input_ids"])

    def second(first):
        ids = torch.cat([first.sequences, torch.arange(10, 12).repeat(rows, 1)], 1)
        grown = torch.ones(rows, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
        given = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], grown], 1)}
        cache = copy.deepcopy(cache_in(first))
        return generate(model, given, **{CACHE: cache}, max_new_tokens=1)[1]

    attached = second(caches[0])
    attachment.detach()
    for first in caches:
        with pytest.raises(ValueError, match="gen_turbo"):
            second(first)
    with attach(model, SHORT.get(place, par)):
        assert torch.equal(second(caches[0]), attached)
    # New conversations of the stock model have nothing to do with it.
    generate(model, inputs)


@pytest.mark.parametrize("place", ["none", *SHORT])
@pytest.mark.parametrize("family", ["llava", "qwen2", "paligemma"])
def test_recorded_states_have_a_row_for_every_token(family, place):
    """Catches states and attentions as long as what ran, which no mask of the prompt fits."""
    vlm = VLMS[family]
    model, inputs = vlm.make("eager"), PROMPTS["padded"].inputs(vlm)
    stock = model(**inputs, output_hidden_states=True, output_attentions=True)
    with attach(model, SHORT.get(place, TurboProcessor(0.0))):
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in found.hidden_states] == [x.shape for x in stock.hidden_states]
    assert [x.shape for x in found.attentions] == [x.shape for x in stock.attentions]
    # The last token's own row is what it saw: nothing is paid to tokens that left.
    last = found.attentions[-1][:, :, -1]
    assert (last.sum(-1) - 1).abs().max() < TOLERANCE
    is_image = inputs["input_ids"] == IMAGE
    if place != "none":
        assert ((last.amax(1) > 0) & is_image).sum() == 2 * (16 - int(16 * 0.6))
    words = inputs["attention_mask"].bool() & ~is_image
    assert torch.equal(found.hidden_states[0][words], stock.hidden_states[0][words])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "place"), [("llava", "pre_llm"), ("llava", "decoder"), ("paligemma", "pre_llm")])
def test_flex_attention_runs_or_is_refused_in_words(family, place):
    """Catches an error of another library about a block mask of another length."""
    vlm = VLMS[family]
    model, inputs = vlm.make("flex_attention"), PROMPTS["one"].inputs(vlm)
    with torch.no_grad():
        model(**inputs)
        with attach(model, SHORT[place]):
            try:
                found = model(**inputs).logits
            except ValueError as error:
                assert "flex" in str(error)
                return
        plain = vlm.make("sdpa")
        with attach(plain, SHORT[place]):
            assert (plain(**inputs).logits - found).abs().max() < TOLERANCE


def test_flash_attention_with_a_static_cache_is_refused_in_words():
    """Catches a mask of four axes given to a kernel that takes two."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, SHORT["pre_llm"]):
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="flash_attention_2 takes no mask"):
            generate(model, inputs, cache_implementation="static")


@pytest.mark.parametrize("is_told", [True, False], ids=["by the call", "by the configuration"])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "llava"])
def test_features_come_as_tuples_where_asked(family, is_told):
    """Catches a wrapper of `get_image_features` that knows one form of its output, or one way to ask for the other."""
    vlm = VLMS[family]
    model, inputs = vlm.make(), PROMPTS["one"].inputs(vlm)
    asked = {"pixel_values": inputs["pixel_values"]} | ({"return_dict": False} if is_told else {})
    model.model.config.return_dict = is_told
    stock = model.model.get_image_features(**asked)
    with attach(model, TurboProcessor(0.6)):
        found = model.model.get_image_features(**asked)
    assert type(found) is type(stock) is tuple and len(found) == len(stock)


@torch.no_grad()
def test_learned_groups_follow_the_model_to_another_type():
    """Catches a projector of float32 behind a tower of bfloat16 once the model was moved."""
    pipe = gen_turbo.load_pipeline("caption", processor=None)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))

    def said(order):
        pipe.vlm.to(torch.float32)
        for step in order:
            if step == "half":
                pipe.vlm.to(torch.bfloat16)
            else:
                attach(pipe.vlm, VisToGVisionProcessor(weights="embedded:vistog/tiny-vlm-64"), replace=True)
        return pipe(photo).texts

    assert said(["attach", "half"]) == said(["half", "attach"])
