"""What `generate` gives with fewer image tokens equals a model that has no cache, no hooks and no padding."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import IdentityProcessor, RandomProcessor, TurboProcessor, attach
from gen_turbo.vlm.cache_argument import CACHE, cache_in
from gen_turbo.vlm.family import packed_grids, sized_grids, target_grids
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm import oracle
from tests.vlm.tiny_kit import IMAGE
from tests.vlm.tiny_vlms import PROMPTS, VLMS, Prompt

# Float32 sums in another order over a few layers; what a wrong mask or position does is a thousand times more.
TOLERANCE = 1e-4
STEPS = 3


def generate(model, inputs, **kwargs):
    """Greedy tokens and the logits they were chosen from: (B, steps), (B, steps, V)."""
    settings: dict = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    # An image's placeholder among the generated tokens would mean nothing.
    settings["suppress_tokens"] = [IMAGE]
    out = model.generate(**inputs, **(settings | kwargs))
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, 1), out


def oracle_method(processor, vlm, cut=0):
    """What a method does to one image, as the gate or the decoder calls it without a semantic value."""
    return oracle.Method(lambda tokens: processor.plan_tokens(tokens, grid=vlm.grid), cut)


def placed(processor, cut):
    """The method at the gate, or in the decoder from layer `cut` on."""
    return Placed(processor, place="decoder", layer=cut) if cut else processor


# Everything for one model of each kind of position and mask; for the others what is hardest.
WHOLE = ("llava", "qwen3", "paligemma")
CASES = [
    (family, prompt, attention, cut)
    for family in VLMS
    for prompt in PROMPTS
    for attention in ("sdpa", "eager")
    for cut in (0, 1, 2)
    if (prompt == "ragged_padded" and cut != 1)
    or (prompt == "one" and attention == "sdpa" and cut < 2)
    or (family in WHOLE and cut != 1)
    if cut in (0, *VLMS[family].cuts)
]
PLACES = [(family, cut) for family, vlm in VLMS.items() for cut in (0, 2) if cut in (0, *vlm.cuts)]
# Stock models that give beams of a row with two images those of other rows, or refuse images with beams.
STOCK_MIXES_BEAMS = ("glm4v", "glm_ocr", "glm5", "llama4")
# With causal attention, sliding windows, and images whose tokens see each other.
TURNS = [("llava", 0), ("llava", 2), ("aya", 0), ("gemma3", 0), ("gemma4", 0)]


@pytest.mark.parametrize(("family", "prompt", "attention", "cut"), CASES)
def test_generate_equals_the_oracle(family, prompt, attention, cut):
    """Catches a wrong mask, position or cache length at any step, row or padding."""
    vlm = VLMS[family]
    model, inputs = vlm.make(attention), PROMPTS[prompt].inputs(vlm)
    method = TurboProcessor(0.6, semantic="none")
    with attach(model, placed(method, cut)):
        new, logits, _ = generate(model, inputs)
    expected = oracle.generated_logits(model, vlm, inputs, new, oracle_method(method, vlm, cut))
    assert (logits - expected).abs().max() < TOLERANCE
    if prompt == "one":
        stock = generate(model, inputs)[1]
        assert (logits[:, 0] - stock[:, 0]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("processor", [TurboProcessor(0.0), IdentityProcessor(0.5)])
@pytest.mark.parametrize(("family", "cut"), PLACES)
def test_nothing_removed_is_bit_identical(family, processor, cut):
    """Catches a hook that computes even the identity another way."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    stock = generate(model, inputs)[1]
    with attach(model, Placed(processor, place="decoder" if cut else "pre_llm")):
        assert torch.equal(generate(model, inputs)[1], stock)


@pytest.mark.parametrize(("family", "cut"), PLACES)
def test_detach_restores_every_object(family, cut):
    """Catches leftovers: hooks, attributes of instances, a wrapped method, draws from the global generator."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    generate(model, inputs)  # transformers installs its own hooks in the first call
    before = model_state(model)
    attachment = attach(model, Placed(TurboProcessor(0.5), place="decoder" if cut else "pre_llm"))
    generate(model, inputs)
    attachment.detach()
    attachment.detach()
    # Positions that Qwen models keep from call to call, attached or not.
    assert set(differences(before, model_state(model))) <= {"model.rope_deltas"}

    inputs["input_ids"][0, -1] = IMAGE
    with pytest.raises(ValueError, match="[Ii]mage|Multimodal"), attach(model, TurboProcessor(0.5)):
        model(**inputs)
    # Positions that Qwen models keep from call to call, attached or not.
    assert set(differences(before, model_state(model))) <= {"model.rope_deltas"}


@pytest.mark.parametrize(("family", "cut"), [place for place in PLACES if place[0] not in STOCK_MIXES_BEAMS])
def test_beams_keep_their_own_prompt(family, cut):
    """Catches features taken for another image's when beams repeat them, and beams reordered without their mask."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    method = TurboProcessor(0.6, semantic="none")
    with attach(model, placed(method, cut)):
        _, _, out = generate(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    for best in range(2):
        expected = oracle.generated_logits(model, vlm, inputs, new[best::2], oracle_method(method, vlm, cut))
        score = expected.log_softmax(-1).gather(2, new[best::2, :, None]).sum((1, 2)) / STEPS
        assert (score - out.sequences_scores[best::2]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", VLMS)
def test_sampling_with_a_seed_repeats(family):
    """Catches a draw of our own from the global generator."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    drawn = []
    with attach(model, RandomProcessor(0.5)):
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(generate(model, inputs, do_sample=True)[0])
    assert torch.equal(*drawn)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", ["one", "even", "ragged"])
def test_a_causal_mask_that_is_left_out_is_made_for_what_stays(prompt, attention):
    """Catches layers of two kinds that are given a mask of the prompt, or none where rows keep different numbers."""
    vlm = VLMS["gemma3"]
    model, inputs = vlm.make(attention), PROMPTS[prompt].inputs(vlm)
    assert inputs["attention_mask"].all()
    del inputs["token_type_ids"]
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    # One column of padding in another row, so that the model makes every mask.
    padded = {name: torch.cat([value, value]) for name, value in inputs.items()}
    padded["attention_mask"][0, 0] = 0
    rows = len(inputs["input_ids"])
    with attach(model, TurboProcessor(0.6, semantic="none")):
        expected = model(**padded).logits[rows:]
        for used in (True, False):
            assert (model(**bare, use_cache=used).logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("family", "cut"), TURNS)
def test_assisted_generation_equals_greedy(family, cut):
    """Catches a cache that is cropped, or a mask of several new tokens, in columns of the full prompt."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, placed(TurboProcessor(0.6, semantic="none"), cut)):
        greedy = generate(model, inputs, max_new_tokens=8)[0]
        looked_up = generate(model, inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)[0]
    assert torch.equal(greedy, looked_up)


def test_without_a_cache_is_the_same():
    """Catches positions with gaps being taken for packed sequences when there is neither cache nor mask."""
    vlm = VLMS["llava"]
    for prompt in ("one", "even", "ragged"):
        model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
        for processor in (TurboProcessor(0.6), Placed(TurboProcessor(0.6), place="decoder")):
            with attach(model, processor):
                cached, uncached = (generate(model, inputs, use_cache=used)[1][:, 0] for used in (True, False))
                full = model(**inputs, use_cache=False).logits
            assert (cached - uncached).abs().max() < TOLERANCE
            assert full.shape[1] == inputs["input_ids"].shape[1]
            assert (full[:, -1] - cached).abs().max() < TOLERANCE


@pytest.mark.parametrize("cut", [0, 2])
def test_right_padding_gives_the_same_logits(cut):
    """Catches logits that no longer stand where the tokens do, and padding that is seen."""
    vlm = VLMS["llava"]
    model, processor = vlm.make("sdpa"), TurboProcessor(0.6, semantic="none")
    left = PROMPTS["ragged_padded"].inputs(vlm)
    right = Prompt(PROMPTS["ragged_padded"].rows, "right").inputs(vlm)
    with attach(model, placed(processor, cut)):
        at_end = generate(model, left)[1][:, 0]
        everywhere = model(**right).logits
    last = right["attention_mask"].sum(1) - 1
    assert everywhere.shape[1] == right["input_ids"].shape[1]
    assert (everywhere[torch.arange(len(last)), last] - at_end).abs().max() < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "cut"), TURNS)
@pytest.mark.parametrize("prompt", ["one", "padded", "ragged", "ragged_padded"])
def test_a_second_turn_goes_on_with_the_cache(prompt, family, cut, attention):
    """Catches a cache whose length is that of its columns: the second turn would be fed again from a wrong place."""
    vlm = VLMS[family]
    model, inputs = vlm.make(attention), PROMPTS[prompt].inputs(vlm)
    method = TurboProcessor(0.6, semantic="none")
    extra = torch.arange(10, 16).repeat(len(inputs["input_ids"]), 1)
    with attach(model, placed(method, cut)):
        new, _, first = generate(model, inputs)
        ids = torch.cat([first.sequences, extra], 1)
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1])], 1
        )
        second = {"input_ids": ids, "attention_mask": mask.long()}
        held = cache_in(first).get_seq_length()
        calls = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a: calls.append(a[0].shape[1])
        )
        again, logits, _ = generate(model, second, **{CACHE: cache_in(first)})
        handle.remove()
    assert calls[0] == ids.shape[1] - held
    continued = {**inputs, "input_ids": ids, "attention_mask": mask.long()}
    expected = oracle.generated_logits(model, vlm, continued, again, oracle_method(method, vlm, cut))
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("family", "cut"), TURNS)
def test_a_image_in_the_second_turn_is_reduced_too(family, cut):
    """Catches a second prefill whose columns are counted from the start of the conversation."""
    vlm = VLMS[family]
    model = vlm.make("sdpa")
    method = TurboProcessor(0.6, semantic="none")
    inputs = PROMPTS["ragged_padded"].inputs(vlm)
    with attach(model, placed(method, cut)):
        _, _, first = generate(model, inputs)
        turn = torch.tensor([[5, 6] + [99] * 16 + [7]] * 3)
        ids = torch.cat([first.sequences, turn], 1)
        grown = torch.ones(3, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
        mask = torch.cat([inputs["attention_mask"], grown], 1)
        more = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(9))
        places = {name: value for name, value in inputs.items() if name == "image_position_ids"}
        new = {"input_ids": ids, "attention_mask": mask, "pixel_values": more, **places, **vlm.extra(ids, mask)}
        # The ids of the whole conversation are sliced by generate; the images are those of this turn.
        again, logits, _ = generate(model, new, **{CACHE: cache_in(first)})
    old = inputs["pixel_values"]
    order = torch.cat([old[:2], more[:1], old[2:3], more[1:2], more[2:]])
    whole = new | {"pixel_values": order} | {name: torch.cat([value] * 2) for name, value in places.items()}
    expected = oracle.generated_logits(model, vlm, whole, again, oracle_method(method, vlm, cut))
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("place", "settings", "words"),
    [
        ("decoder", {"cache_implementation": "static"}, "a StaticCache cannot hold a prompt with dropped image tokens"),
        ("decoder", {"prefill_chunk_size": 8}, "prefill in one piece"),
        ("pre_llm", {"prefill_chunk_size": 8}, "prefill in one piece"),
    ],
)
def test_what_cannot_be_exact_is_refused(place, settings, words):
    """Catches static shapes and split prompts giving wrong tokens in silence."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, Placed(TurboProcessor(0.5), place=place)), pytest.raises(ValueError, match=words):
        generate(model, inputs, **settings)


def test_inputs_embeds_are_recognised():
    """Catches images that are missed where the prompt comes as embeddings."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with attach(model, TurboProcessor(0.5)):
        by_ids = model(**inputs).logits
        by_embeds = model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
    assert torch.equal(by_ids, by_embeds)


@pytest.mark.parametrize(
    ("family", "grids_of", "side", "name"),
    [("mistral3", sized_grids, 16, "image_sizes"), ("qwen2", packed_grids, 2, "image_grid_thw"),
     ("minicpm4_6", target_grids, 4, "target_sizes")],
)  # fmt: skip
def test_images_of_one_length_have_their_own_shapes(family, grids_of, side, name):
    """Catches an image of 2 x 8 tokens planned as 4 x 4 where both come, and a grid for another number of tokens."""
    base = VLMS[family].make().model
    grids, lengths = [(2, 8), (4, 4), (2, 8), (6, 4)], [16, 16, 16, 24]
    sizes = torch.tensor([[*[1] * (name == "image_grid_thw"), h * side, w * side] for h, w in grids])
    assert grids_of(base, {name: sizes}, lengths) == grids
    assert grids_of(base, {name: sizes}, [16, 16, 17, 24]) == [*grids[:2], None, grids[3]]
    assert grids_of(base, {name: sizes}, lengths[:3]) == [None] * 3
