"""Text and references whose keys and values the model keeps, as Qwen-Image 2.1: merged once per prompt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.methods.random import RandomProcessor
from tests.engine.families import Keys, relative
from tests.snapshots import differences, model_state
from tests.tiny_family import random
from tests.tiny_images import qwen_21

TARGET, REFERENCES = (8, 8), ((8, 12), (4, 4))
BEFORE, BETWEEN, BEHIND = 3, 2, 5
"""Words before the first reference, between the two, and behind the second."""
NUM_WORDS, NUM_SLOTS = BEFORE + BETWEEN + BEHIND, (24, 4)
TIMES = (900, 700, 500, 300)
SCOPES = ("attention", "block", "model")
NO_TARGET = {"ratio": 0.01, "layer_ratios": {"*": 0.0}, "restore": "copy"}
"""Settings with which the target keeps every token."""


def model_of(num_layers: int = 2) -> nn.Module:
    """A tiny model whose attention is sharp enough to tell keys from each other."""
    torch.manual_seed(0)
    model = qwen_21(num_layers).eval()
    for block in model.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            nn.init.constant_(norm.weight, 3.0)
        block.attn.to_out[0].weight.data.mul_(3)
    return model


def call_of(batch: int = 2, hidden: int = 0, seed: int = 1) -> dict[str, object]:
    """Words around two smooth images; the last row hides so many words."""
    num_slots = NUM_WORDS + sum(NUM_SLOTS)
    slots = torch.ones(num_slots + TARGET[0] * TARGET[1] // 4).bool()
    slots[:BEFORE] = slots[BEFORE + NUM_SLOTS[0] :][:BETWEEN] = slots[num_slots - BEHIND : num_slots] = False
    mask = torch.ones(batch, num_slots).bool()
    mask[-1, num_slots - hidden :] = False
    images = [_image(batch, *grid, seed + i) for i, grid in enumerate(REFERENCES)]
    return {
        "references": torch.cat(images, 1),
        "encoder_hidden_states": random(batch, num_slots, 32, seed=seed),
        "encoder_hidden_states_mask": mask if hidden else None,
        "img_shapes": [[(1, *grid) for grid in (*REFERENCES, TARGET)]] * batch,
        "img_mask": slots.repeat(batch, 1),
        "kv_cache": QwenImage21KVCache(2),
    }


def _image(batch: int, height: int, width: int, seed: int) -> Tensor:
    smooth = F.interpolate(random(batch, 16, 3, 3, seed=seed), (height, width), mode="bicubic")
    return smooth.flatten(2).transpose(1, 2)


@torch.no_grad()
def run(model: nn.Module, call: dict[str, object], times: tuple[int, ...] = TIMES, fills: bool = True) -> Tensor:
    """The target of every step; the first fills the cache."""
    given, outputs = dict(call), []
    references = given.pop("references")
    target = _image(len(references), *TARGET, 9)
    for step, time in enumerate(times):
        sample = torch.cat([references, target * (1 - 0.05 * step)], 1)
        mode = "extract" if step == 0 and fills else "cached"
        told = {"timestep": torch.full((len(sample),), time / 1000), "kv_cache_mode": mode, "return_dict": False}
        outputs.append(model(hidden_states=sample, **given, **told)[0][:, -TARGET[0] * TARGET[1] :])
    return torch.stack(outputs)


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_each_part_is_shortened_by_its_own_ratio(scope, hidden):
    """Catches a part that takes another's ratio, a model that is left short, and a cache of the caller that is."""
    model, call = model_of(), call_of(hidden=hidden)
    stock, before = run(model, call), model_state(model)
    kept = [tensor.clone() for layer in call["kv_cache"].layer_caches for tensor in layer.get()]
    num_words, *num_images = NUM_WORDS - int(NUM_WORDS * 0.3), 96 - int(96 * 0.6), 16 - int(16 * 0.6)
    settings = {"text_ratio": 0.3, "reference_ratio": 0.6, "scope": scope, "restore": "copy"}
    with attach(model, TurboProcessor(0.4, **settings)) as attachment, Keys() as keys:
        short = run(model, call)
        assert report(model).text_tokens == (NUM_WORDS + 96 + 16, num_words + sum(num_images))
        assert attachment.parts[0].root.num_bytes > 2 * 2 * 2 * sum(num_images) * 32 * 4
    assert keys.seen[-1] == (39, 39 + num_words + sum(num_images))
    assert torch.equal(short[0], stock[0]) and 0 < relative(short[1:], stock[1:]) < 0.5
    again = [tensor for layer in call["kv_cache"].layer_caches for tensor in layer.get()]
    assert all(map(torch.equal, again, kept))
    # The model itself replaces its tables of positions in every call.
    assert differences(before, model_state(model)) == ["pos_embed.freqs"] and torch.equal(run(model, call), stock)


def test_nothing_removed_is_bit_identical():
    """Catches parts that change their order, and a mask that is dropped though nothing was merged."""
    model, call = model_of(), call_of(hidden=2)
    stock = run(model, call)
    for scope in SCOPES:
        for reducer in (TurboProcessor(0.0, scope=scope), IdentityProcessor(0.4, scope=scope)):
            with attach(model, reducer):
                assert torch.equal(run(model, call), stock)
                assert report(model).text_tokens == (0, 0)
    with attach(model, TurboProcessor(**NO_TARGET, reference_ratio=0.0)):
        assert torch.equal(run(model, call), stock)


def test_references_take_the_ratio_of_the_target_unless_told():
    """Catches references that are kept in full without a word, or merged though that was refused."""
    model, call = model_of(), call_of()
    for ratio, num in ((None, 96 - 38 + 16 - 6), (0.0, 96 + 16), (0.75, 24 + 4)):
        with attach(model, TurboProcessor(0.4, restore="copy", reference_ratio=ratio)), Keys() as keys:
            run(model, call)
        assert keys.seen[-1] == (39, 39 + NUM_WORDS + num)


@pytest.mark.parametrize("backend", [None, "native"])
def test_a_merged_key_weighs_as_much_as_its_tokens(backend):
    """Catches keys that count once, sizes at the keys of another part, and parts in another order than their tokens.

    The oracle is stock on a cache of full length, in which every key is the mean of those that are merged.
    """
    model, call = model_of(1), call_of() | {"kv_cache": QwenImage21KVCache(1)}
    run(model, call, TIMES[:1])
    settings = {"reference_ratio": 0.5, "text_ratio": 0.3, "attention_backend": backend}
    with attach(model, TurboProcessor(**NO_TARGET, **settings)) as attachment:
        merged = run(model, call, TIMES[1:], fills=False)
        (context,) = attachment.parts[0].root.runs.contexts()
        short, sizes = context.text.arguments["kv_cache"].layer_caches[0], context.text.sizes
    whole = QwenImage21KVCache(1)
    counts = sizes.round().long()
    rows = [tensor[row].repeat_interleave(counts[row], 0) for tensor in short.get() for row in range(2)]
    whole.layer_caches[0].store(torch.stack(rows[:2]), torch.stack(rows[2:]))
    assert whole.layer_caches[0].k.shape == call["kv_cache"].layer_caches[0].k.shape
    assert relative(merged, run(model, call | {"kv_cache": whole}, TIMES[1:], fills=False)) < 1e-5
    means = [tensor.mean(1) for tensor in whole.layer_caches[0].get()]
    expected = [tensor.mean(1) for tensor in call["kv_cache"].layer_caches[0].get()]
    for a, b in zip(means, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [None, "native"])
def test_hidden_words_stay_hidden(backend):
    """Catches padding of another row that becomes a key, alone or in the mean of words that are shown."""
    model, call = model_of(), call_of(hidden=2)
    other = dict(call, kv_cache=QwenImage21KVCache(2), encoder_hidden_states=call["encoder_hidden_states"].clone())
    other["encoder_hidden_states"][-1, -2:] = 7 * random(2, 32, seed=8)
    for settings in ({"text_ratio": 0.3}, {"text_ratio": 0.9}, {"reference_ratio": 0.6}):
        with attach(model, TurboProcessor(**NO_TARGET, **settings, attention_backend=backend)):
            outputs = [run(model, given)[1:, -1] for given in (call, other)]
        assert relative(*outputs) < 1e-5


def test_it_is_merged_once_for_each_prompt_and_anew_for_another_cache():
    """Catches a map in every step, and keys of one prompt that are read for another one or after they were filled."""
    grids = []

    class Planned(TurboProcessor):
        def plan(self, tokens, site, frame):
            grids.append(site.grid)
            return super().plan(tokens, site, frame)

    model, calls = model_of(), [call_of(seed=seed) for seed in (1, 4)]
    alone = []
    for call in calls:
        with attach(model, TurboProcessor(**NO_TARGET, reference_ratio=0.6)):
            alone.append(run(model, call))
    with attach(model, Planned(**NO_TARGET, reference_ratio=0.6)):
        for call, expected in zip(calls, alone, strict=True):
            grids.clear()
            assert torch.equal(run(model, call), expected)
            assert grids == list(REFERENCES)
        grids.clear()
        assert torch.equal(run(model, calls[0] | {"kv_cache": QwenImage21KVCache(2)}), alone[0])
        assert grids == list(REFERENCES)
        # The caller fills the same cache for the other prompt's references.
        mixed = calls[0] | {"kv_cache": calls[1]["kv_cache"]}
        assert torch.equal(run(model, mixed), alone[0])


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.75])
def test_similar_tokens_are_worth_more_than_random_ones(ratio):
    """Catches a map of other tokens than those whose keys are merged: then it does no better than chance."""
    model, call = model_of(), call_of()
    stock, errors = run(model, call)[1:], []
    for reducer in (
        TurboProcessor(**NO_TARGET, reference_ratio=ratio),
        RandomProcessor(**NO_TARGET, reference_ratio=ratio, scope="attention"),
    ):
        with attach(model, reducer):
            errors.append(relative(run(model, call)[1:], stock))
    assert errors[0] < 0.85 * errors[1]
