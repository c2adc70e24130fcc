"""Words of the prompt before a causal language model: the same answers as without cache, hooks and padding."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import IdentityProcessor, RandomProcessor, TurboProcessor, attach, report
from gen_turbo.engine.denoiser import NoEffectWarning
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.vlm.cache_argument import CACHE, cache_in
from gen_turbo.vlm.settings import Placed
from gen_turbo.vlm.words import special_ids
from tests.snapshots import differences, model_state
from tests.vlm import oracle
from tests.vlm.test_generate import STEPS, TOLERANCE, generate, oracle_method
from tests.vlm.tiny_kit import IMAGE, PAD
from tests.vlm.tiny_vlms import PROMPTS, VLMS, Prompt

RATIO = 0.4
# Rows of other lengths, an image in the middle, a row of words alone; special tokens are put in by `prompt`.
ROWS = [[4, "i", 9], [7, "i", 3, "i", 6], [12]]
CASES = [
    (family, attention, cut)
    for family in VLMS
    for attention in ("sdpa", "eager")
    for cut in (0, 2)
    if (cut == 0 and attention == "sdpa") or family in ("llava", "qwen3", "paligemma")
]


def prompt(vlm, rows=ROWS, side="left"):
    """A padded batch with special tokens between words; the first row alone has a beginning of text."""
    inputs = Prompt(rows, side).inputs(vlm)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    ids[0, real[0].nonzero()[0, 0]] = 1
    for row, mask in zip(ids, real, strict=True):
        places = mask.nonzero()[:, 0]
        # The first and last words are the same as their neighbours, so that they would leave first.
        row[places[-4]], row[places[-3]], row[places[-2]] = 1, 97, row[places[-1]]
    for row, mask in zip(ids[1:], real[1:], strict=True):
        first = mask.nonzero()[0, 0]
        row[first + 1] = row[first]
    return inputs


def words_of(model, ids):
    """Columns of one unpadded prompt that may leave: those before the first id that a model names near the last."""
    firsts = {"Qwen2_5Omni": 98, "Qwen3Omni": 98, "Qwen": 96, "PaddleOCR": 96, "Llama4": 96, "Gemma4": 95, "Glm": 94}
    firsts |= {"Ernie": 94, **dict.fromkeys(("Cosmos", "CohereCompass", "Lfm3"), 96)}
    added = next((first for name, first in firsts.items() if type(model).__name__.startswith(name)), IMAGE)
    return [at for at in range(1, len(ids) - 1) if int(ids[at]) not in (PAD, 1) and int(ids[at]) < added]


@torch.no_grad()
def next_logits(model, vlm, ids, own, deep, count, method):
    """Logits after one unpadded row whose first `count` tokens are the prompt, `method` and the words' planner."""
    method, processor = method
    text = model.get_submodule(vlm.text)
    hidden, added = oracle.embedded(model, ids, own, deep)
    places = words_of(model, ids[:count])
    # Rows without an image keep their words.
    removed = int(RATIO * len(places)) if own else 0
    columns = list(range(len(ids)))
    if removed:
        plan = type(processor)((removed + 0.5) / len(places), semantic="none").plan_tokens(hidden[None, places])
        assert plan.num_slots == len(places) - removed
        anchors = [places[anchor] for anchor in plan.anchor_BM[0].tolist()]
        hidden[anchors] = oracle.reduce_row(hidden[places], plan, True)
        columns = [column for column in columns if column not in places or column in anchors]
    is_prefix, positions = "PaliGemma" in type(model).__name__, oracle.positions_of(model, ids, len(own))
    prefix = sum(column < count for column in columns) * is_prefix
    hidden, added, kept_ids = hidden[columns], [one[columns] for one in added], ids[columns]
    blocks = oracle.blocks_of(model, kept_ids)
    run = oracle.run_layers
    more = {"blocks": blocks, "experts": oracle.experts_of(model, kept_ids)}
    if not vlm.is_whole:
        hidden = run(text, hidden[None], positions[..., columns], 0, method.cut, prefix, added, **more)[0]
    hidden, added, kept = oracle.reduce_images(hidden, added, kept_ids, vlm.num_tokens, method)
    columns = [columns[index] for index in kept]
    prefix, depth = sum(column < count for column in columns) * is_prefix, text.config.num_hidden_layers
    blocks, positions = None if blocks is None else blocks[kept], positions[..., columns]
    if vlm.is_whole:
        return oracle.whole_logits(model, text, hidden, positions, ids[columns])
    given = {"blocks": blocks, "inputs": oracle.inputs_of(text, hidden, ids[columns])}
    given["experts"] = oracle.experts_of(model, ids[columns])
    out = run(text, hidden[None], positions, method.cut, depth, prefix, added, **given)
    return oracle.logits_of(model, text, out)


def expected_logits(model, vlm, inputs, new, processor, cut=0):
    """Logits of every step by the slow way."""
    method = (oracle_method(processor, vlm, cut), processor)
    return oracle.generated_logits(model, vlm, inputs, new, method, logits=next_logits)


@pytest.mark.parametrize(("family", "attention", "cut"), CASES)
def test_generate_equals_the_oracle(family, attention, cut):
    """Catches a special, first, last or padded token that leaves, words of another row, positions that close up."""
    vlm = VLMS[family]
    model, inputs = vlm.make(attention), prompt(vlm)
    processor = TurboProcessor(0.6, semantic="none", text_ratio=RATIO)
    with attach(model, Placed(processor, place="decoder" if cut else "pre_llm")):
        new, logits, _ = generate(model, inputs)
    assert logits.shape[1] == STEPS
    assert (logits - expected_logits(model, vlm, inputs, new, processor, cut)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5", "paligemma"])
def test_words_alone_leave(family):
    """Catches words that leave only where image tokens do."""
    vlm = VLMS[family]
    model, inputs = vlm.make(), prompt(vlm)
    processor = TurboProcessor(0.0, semantic="none", text_ratio=RATIO)
    with attach(model, processor):
        new, logits, _ = generate(model, inputs)
        rows = {row.name: (row.num_tokens, row.num_kept) for row in report(model).layers}
    assert (logits - expected_logits(model, vlm, inputs, new, processor)).abs().max() < TOLERANCE
    assert (logits[:, 0] - generate(model, inputs)[1][:, 0]).abs().max() > 100 * TOLERANCE
    words = [len(words_of(model, ids[mask.bool()])) for ids, mask in zip(*_rows(inputs), strict=True)]
    words = words[:2]  # The last row has no image.
    assert rows["prompt"] == (sum(words), sum(n - int(RATIO * n) for n in words))


def _rows(inputs):
    return inputs["input_ids"], inputs["attention_mask"]


def test_beams_sampling_and_right_padding():
    """Catches beams with the words of another row, draws of our own, and padding that counts as a last word."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make(), prompt(vlm)
    processor = TurboProcessor(0.6, semantic="none", text_ratio=RATIO)
    right = prompt(vlm, side="right")
    with attach(model, processor):
        _, _, out = generate(model, inputs, num_beams=3, output_scores=True)
        at_end = generate(model, inputs)[1][:, 0]
        everywhere = model(**right).logits
        last = right["attention_mask"].sum(1) - 1
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(generate(model, inputs, do_sample=True)[0])
    assert (everywhere[torch.arange(3), last] - at_end).abs().max() < TOLERANCE
    assert torch.equal(*drawn)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = expected_logits(model, vlm, inputs, new, processor)
    score = expected.log_softmax(-1).gather(2, new[:, :, None]).sum((1, 2)) / STEPS
    assert (score - out.sequences_scores).abs().max() < TOLERANCE


def test_assisted_generation_equals_greedy():
    """Catches guesses that stand behind the prompt in its own call and are dropped as its words."""
    vlm = VLMS["llava"]
    model, calls = vlm.make(), []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: calls.append(a[0].shape[1]))
    for rows in ([[4, "i", 9]], [[12, "i", 9]]):
        inputs = prompt(vlm, rows)
        words = (inputs["input_ids"][0] != IMAGE).nonzero()[1:, 0]
        inputs["input_ids"][0, words] = 5 + torch.arange(len(words)) % 3
        with attach(model, TurboProcessor(0.6, text_ratio=RATIO)):
            greedy = generate(model, inputs, max_new_tokens=8)[0]
            prefill = calls[0]
            calls.clear()
            guessed = generate(model, inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)[0]
        assert torch.equal(greedy, guessed) and calls[0] > prefill
        calls.clear()
    handle.remove()


@pytest.mark.parametrize("prompted", ["padded", "ragged_padded"])
def test_a_second_turn_goes_on_with_the_cache(prompted):
    """Catches words of the second turn dropped though it brings no image, and lengths that forget the words."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make(), PROMPTS[prompted].inputs(vlm)
    processor = TurboProcessor(0.6, semantic="none", text_ratio=RATIO)
    with attach(model, processor):
        _, _, first = generate(model, inputs)
        ids = torch.cat([first.sequences, torch.arange(10, 16).repeat(len(inputs["input_ids"]), 1)], 1)
        grown = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
        mask = torch.cat([inputs["attention_mask"], grown], 1)
        again, logits, _ = generate(model, {"input_ids": ids, "attention_mask": mask}, **{CACHE: cache_in(first)})
    first_turn = inputs["attention_mask"].sum(1)

    def logits_of(model, vlm, row, own, levels, count, method):
        number = next(index for index, one in enumerate(ids) if torch.equal(one[mask[index].bool()], row[:count]))
        return next_logits(model, vlm, row, own, levels, int(first_turn[number]), method)

    whole = {**inputs, "input_ids": ids, "attention_mask": mask}
    method = (oracle_method(processor, vlm), processor)
    expected = oracle.generated_logits(model, vlm, whole, again, method, logits=logits_of)
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", VLMS)
def test_detach_restores_and_nothing_removed_is_bit_identical(family):
    """Catches leftovers, and words that leave where the method keeps everything."""
    vlm = VLMS[family]
    model, inputs = vlm.make(), prompt(vlm)
    stock, before = generate(model, inputs)[1], model_state(model)
    towers = [TurboVisionProcessor(0.5, text_ratio=0.4)] * vlm.has_tower
    for processor in (TurboProcessor(0.5, text_ratio=0.4), *towers):
        with attach(model, processor):
            assert torch.isfinite(generate(model, inputs)[1]).all()
    assert set(differences(before, model_state(model))) <= {"model.rope_deltas"}
    with attach(model, IdentityProcessor(0.5, text_ratio=0.4)):
        assert torch.equal(generate(model, inputs)[1], stock)


def test_what_has_no_effect_or_no_ids_is_told():
    """Catches silence: too few words for the ratio, prompts as embeddings, places and ratios that cannot be."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make(), prompt(vlm)
    with (
        attach(model, TurboProcessor(0.0, text_ratio=0.05)),
        pytest.warns(NoEffectWarning, match="no word was removed"),
    ):
        model(**inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with attach(model, RandomProcessor(0.0, text_ratio=0.5)), pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="not at place='projector'"):
        attach(model, Placed(TurboProcessor(0.5, text_ratio=0.5), place="projector"))


def test_added_tokens_that_no_configuration_names_stay():
    """Catches markers of a chat, which lie among the added tokens, taken for words."""
    vlm = VLMS["qwen2_5"]
    model, inputs = vlm.make(), prompt(vlm)
    model.config.vision_start_token_id = model.config.video_token_id
    assert 97 not in special_ids(model)[0]
    processor = TurboProcessor(0.6, semantic="none", text_ratio=RATIO)
    with attach(model, processor):
        new, logits, _ = generate(model, inputs)
    assert (logits - expected_logits(model, vlm, inputs, new, processor)).abs().max() < TOLERANCE


def test_special_tokens_are_read_from_the_configurations():
    """Catches names of nested configurations that are not read, and added tokens taken for words."""
    assert special_ids(VLMS["llava"].make()) == ({PAD, 1, IMAGE}, IMAGE)
    known, first = special_ids(VLMS["qwen2_5"].make())
    assert {PAD, 1, 96, 97, 98, IMAGE} <= known and first == 96
