"""Routing: dropped tokens, skipped layers, row by row, against a model without cache, hooks and padding."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import attach, report
from gen_turbo.vlm.cache_argument import CACHE, cache_in
from tests.snapshots import differences, model_state
from tests.vlm.par_oracle import Forced, chooser_for, generated_logits
from tests.vlm.test_generate import STEPS, TOLERANCE, generate
from tests.vlm.tiny_kit import IMAGE
from tests.vlm.tiny_vlms import PROMPTS, VLMS

CUT = [family for family, vlm in VLMS.items() if vlm.cuts]
WHOLE = ("llava", "qwen3", "paligemma")
CASES = [
    (family, prompt, attention, first)
    for family in CUT
    for prompt in PROMPTS
    for attention in ("sdpa", "eager")
    for first in (0, 1, 2)
    if (prompt == "ragged_padded" and first == 2 and (attention == "sdpa" or family in WHOLE))
    or (family in WHOLE and attention == "sdpa" and first == 0 and prompt in ("ragged", "padded"))
    or (family == "llava" and prompt in ("one", "ragged_padded"))
]


def forced(model, **settings):
    """A processor that routes by a fixed function of each row."""
    return Forced(chooser=chooser_for(model), **settings)


@pytest.mark.parametrize(("family", "prompt", "attention", "first"), CASES)
def test_routed_generation_equals_the_oracle(family, prompt, attention, first):
    """Catches a wrong row, mask, position or cache length in any layer, step or padding."""
    vlm = VLMS[family]
    model, inputs = vlm.make(attention), PROMPTS[prompt].inputs(vlm)
    processor = forced(model, first=first)
    with attach(model, processor):
        new, logits, _ = generate(model, inputs)
    expected = generated_logits(model, vlm, inputs, new, processor)
    assert (logits - expected).abs().max() < TOLERANCE
    assert processor.chooser.asked == 1
    stock = generate(model, inputs)[1]
    assert (logits[0, 0] - stock[0, 0]).abs().max() > 100 * TOLERANCE


def test_rows_choose_different_layers():
    """Catches test prompts whose rows agree, so that the oracle would not see rows mixed up."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["even"].inputs(vlm)
    ran = []
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, output: ran.append(len(output[0])))
        for layer in model.model.language_model.layers
    ]
    with attach(model, forced(model)):
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert 1 in ran and sum(ran) == 2 * 3


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_skipped_layers_hold_nothing(attention, num_layers):
    """Catches layers that are computed and thrown away, and caches that are filled for rows that skip."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make(attention), PROMPTS["padded"].inputs(vlm)
    processor = forced(model, num_layers=num_layers)
    with attach(model, processor):
        new, logits, out = generate(model, inputs)
    held = [0 if layer.keys is None else len(layer.keys) for layer in cache_in(out).layers]
    assert sum(held) == 2 * num_layers and held[0] == 2
    assert (logits - generated_logits(model, vlm, inputs, new, processor)).abs().max() < TOLERANCE


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen2_5", "paligemma"])
def test_hiding_equals_dropping(family, first, prompt):
    """Catches a dropped token that is still seen or a skipped layer that still acts, in either form."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    logits = {}
    for mode in ("drop", "mask"):
        with attach(model, forced(model, first=first, mode=mode)), torch.no_grad():
            logits[mode] = model(**inputs, use_cache=False).logits
    stays = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert (logits["drop"] - logits["mask"])[stays].abs().max() < TOLERANCE


def test_hiding_refuses_a_cache():
    """Catches hidden tokens that the next step sees again."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, forced(model, mode="mask")), pytest.raises(ValueError, match="pass use_cache=False"):
        generate(model, inputs)


@pytest.mark.parametrize("prompt", ["padded", "ragged_padded"])
@pytest.mark.parametrize("family", ["llava", "qwen3", "paligemma"])
def test_beams_keep_their_own_route(family, prompt):
    """Catches beams reordered in layers that hold some rows only."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    processor = forced(model)
    with attach(model, processor):
        _, _, out = generate(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    for best in range(2):
        expected = generated_logits(model, vlm, inputs, new[best::2], processor)
        score = expected.log_softmax(-1).gather(2, new[best::2, :, None]).sum((1, 2)) / STEPS
        assert (score - out.sequences_scores[best::2]).abs().max() < TOLERANCE


def test_assisted_generation_equals_greedy():
    """Catches a cache that cannot be cropped where layers are empty."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, forced(model)):
        greedy = generate(model, inputs, max_new_tokens=8)[0]
        looked_up = generate(model, inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)[0]
    assert torch.equal(greedy, looked_up)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("prompt", ["one", "ragged_padded"])
def test_a_second_turn_keeps_the_route(prompt, first):
    """Catches layers chosen anew for a conversation whose earlier tokens some layers never saw."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    processor = forced(model, first=first)
    extra = torch.arange(10, 16).repeat(len(inputs["input_ids"]), 1)
    with attach(model, processor):
        _, _, out = generate(model, inputs)
        ids = torch.cat([out.sequences, extra], 1)
        grown = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
        mask = torch.cat([inputs["attention_mask"], grown], 1)
        again, logits, _ = generate(model, {"input_ids": ids, "attention_mask": mask}, **{CACHE: cache_in(out)})
    later = torch.cat([ids[:, inputs["input_ids"].shape[1] :], again], 1)
    expected = generated_logits(model, vlm, inputs, later, processor)[:, -again.shape[1] :]
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", CUT)
def test_everything_kept_is_bit_identical(family):
    """Catches a whole budget that is computed another way."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    stock = generate(model, inputs)[1]
    with attach(model, forced(model, removed=0.0, num_layers=4)):
        assert torch.equal(generate(model, inputs)[1], stock)


def test_layers_alone_and_tokens_alone():
    """Catches one of the two choices needing the other."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    for settings in ({"removed": 0.0}, {"num_layers": 4}):
        processor = forced(model, **settings)
        with attach(model, processor):
            new, logits, _ = generate(model, inputs)
        assert (logits - generated_logits(model, vlm, inputs, new, processor)).abs().max() < TOLERANCE


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("family", ["llava", "qwen3", "paligemma"])
def test_detach_restores_every_object(family, mode):
    """Catches leftovers, after use and after an exception inside."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    generate(model, inputs)
    before = model_state(model)
    attachment = attach(model, forced(model, mode=mode))
    model(**inputs, use_cache=False)
    attachment.detach()
    attachment.detach()
    assert set(differences(before, model_state(model))) <= {"model.rope_deltas"}
    inputs["input_ids"][0, -1] = IMAGE
    with pytest.raises(ValueError, match="[Ii]mage"), attach(model, forced(model, mode=mode)):
        model(**inputs)
    assert set(differences(before, model_state(model))) <= {"model.rope_deltas"}


def test_no_state_from_call_to_call():
    """Catches a route or scores that outlive their prompt: another batch, no image, a failed call."""
    vlm = VLMS["llava"]
    model = vlm.make("sdpa")
    one, many = PROMPTS["one"].inputs(vlm), PROMPTS["ragged_padded"].inputs(vlm)
    text = {"input_ids": torch.tensor([[1, 2, 3]])}
    stock = generate(model, text)[1]
    with attach(model, forced(model)):
        first = generate(model, one)[1]
        generate(model, many)
        broken = {**many, "input_ids": many["input_ids"].masked_fill(many["input_ids"] == IMAGE, 5)}
        with pytest.raises(ValueError, match="[Ii]mage"):
            model(**broken)
        assert torch.equal(generate(model, text)[1], stock)
        assert torch.equal(generate(model, one)[1], first)


def test_report_counts_what_ran():
    """Catches tokens or rows that are counted where they did not run."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["even"].inputs(vlm)
    ran = []
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output: ran.append(output.shape[0] * output.shape[1]))
        for layer in model.model.language_model.layers
    ]
    with attach(model, forced(model)):
        model(**inputs)
        found = report(model)
    for handle in handles:
        handle.remove()
    rows = [row for row in found.layers if row.status == "reduced"]
    assert sorted(row.num_kept for row in rows if row.num_kept) == sorted(ran)
    assert {row.num_tokens for row in rows} == {2 * 23}
    assert 0 < found.flops_saved < 1 and "router" in str(found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_layers": 5}, "5 layers are to run"),
        ({"num_layers": 0}, "at least one decoder layer must run"),
        ({"removed": 1.0}, r"must be in \[0, 1\)"),
        ({"first": 4}, "first=4 is not one of the 4 layers"),
        ({"mode": "hide"}, "mode must be one of drop, mask, soft"),
        ({"step_scale": {0: 0.5}}, "step_scale=.*has no effect on this LlavaForConditionalGeneration"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    """Catches a budget that is clipped in silence, and a model half attached."""
    model = VLMS["llava"].make("sdpa")
    before = model_state(model)
    with pytest.raises(ValueError, match=words):
        attach(model, forced(model, **settings))
    assert not differences(before, model_state(model))


def test_a_static_cache_is_refused():
    """Catches fixed lengths being filled with fewer tokens in silence."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, forced(model)), pytest.raises(ValueError, match="a StaticCache cannot hold"):
        generate(model, inputs, cache_implementation="static")
