"""Keys of the language model that weigh by how many tokens they stand for, against slow right answers."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import TurboProcessor, attach
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.vlm.settings import Placed
from tests.vlm import oracle
from tests.vlm.test_generate import STEPS, TOLERANCE, generate
from tests.vlm.tiny_vlms import PROMPTS, VLMS

REFUSED = (
    "qwen3_5", "qwen3_5_moe", "aya", "cohere2_vision", "lfm2", "llama4", "exaone", "step3", "minicpm4_6", "minicpm4_7",
    "minicpm_ocr", "qwen4", "compass", "lfm3", "muse", "muse_spark", "glm5", "mistral_large4",
)  # fmt: skip
FAMILIES = [family for family in VLMS if family not in REFUSED]
METHOD = TurboProcessor(0.6, semantic="none", proportional_attention=True)
CASES = [(family, "sdpa", "ragged_padded") for family in FAMILIES]
CASES += [(family, "eager", prompt) for family in ("llava", "qwen3", "gemma3", "paligemma") for prompt in PROMPTS]


def weighed(vlm):
    """What the method does to one image."""
    return oracle.Method(lambda tokens: METHOD.plan_tokens(tokens, grid=vlm.grid), is_weighed=True)


@pytest.mark.parametrize(("family", "attention", "prompt"), CASES)
def test_answers_equal_those_of_weighed_keys(family, attention, prompt):
    """Catches sizes of other columns, of the prompt alone, lost in decoding, and masks that nothing adds to."""
    vlm = VLMS[family]
    model, inputs = vlm.make(attention), PROMPTS[prompt].inputs(vlm)
    with attach(model, METHOD):
        new, logits, _ = generate(model, inputs)
    expected = oracle.generated_logits(model, vlm, inputs, new, weighed(vlm))
    assert (logits - expected).abs().max() < TOLERANCE
    with attach(model, TurboProcessor(0.6, semantic="none")):
        _, without, _ = generate(model, inputs)
    assert (logits[:, 0] - without[:, 0]).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen3", "paligemma"])
@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_other_caches_weigh_alike(family, how):
    """Catches places of a static cache that weigh by a neighbour's size, and calls without a cache."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    with attach(model, METHOD):
        new, logits, _ = generate(model, inputs)
        if "use_cache" in how:
            with torch.no_grad():
                found = model(**inputs, use_cache=False).logits[:, -1]
            assert (found - logits[:, 0]).abs().max() < TOLERANCE
            return
        other, found, _ = generate(model, inputs, **how)
    assert torch.equal(new, other) and (logits - found).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5", "paligemma"])
def test_beams_keep_their_sizes(family):
    """Catches sizes that stay behind where beams change rows."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    with attach(model, METHOD):
        _, _, out = generate(model, inputs, num_beams=3, output_scores=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = oracle.generated_logits(model, vlm, inputs, new, weighed(vlm))
    score = expected.log_softmax(-1).gather(2, new[:, :, None]).sum((1, 2)) / STEPS
    assert (score - out.sequences_scores).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("family", "attention", "method", "why"),
    [
        ("qwen3_5", "sdpa", METHOD, "recurrent layers"),
        ("aya", "sdpa", METHOD, "sliding windows"),
        ("llava", "flex_attention", METHOD, "flex_attention does not take"),
        ("llava", "sdpa", Placed(METHOD, place="decoder"), "place='pre_llm'"),
        ("llava", "sdpa", PyramidDropProcessor(0.5, cuts=[1, 2], proportional_attention=True), "place='pre_llm'"),
    ],
)
def test_what_cannot_weigh_keys_is_refused(family, attention, method, why):
    """Catches keys that weigh alike though it was asked for otherwise."""
    with pytest.raises(ValueError, match=f"proportional_attention.*{why}|{why}.*proportional_attention"):
        attach(VLMS[family].make(attention), method)
