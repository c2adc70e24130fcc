"""Image tokens that leave in several stages, against slow loops: which ones, and what the layers behind make of it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from gen_turbo import attach, report
from gen_turbo.bench.understanding import mean_kept
from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.methods.vscan import VScanProcessor
from gen_turbo.vlm.cache_argument import CACHE
from tests.snapshots import differences, model_state
from tests.vlm import oracle
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.tiny_kit import IMAGE
from tests.vlm.tiny_vlms import PROMPTS, VLMS

# These make queries and keys otherwise, so that no method reads what they attend to.
UNREAD = ("kimi", "hunyuan")
FAMILIES = [name for name, vlm in VLMS.items() if vlm.cuts and name not in UNREAD]


def images_of(columns, ids, size):
    """The columns that are left of each image of one row."""
    images = [column for column in range(len(ids)) if ids[column] == IMAGE]
    return [[one for one in images[at : at + size] if one in columns] for at in range(0, len(images), size)]


def kept_columns(model, vlm, ids, own, deep, kept):
    """Which columns of a prompt (n,) each cut leaves, by its first layer, from the attention of the last token."""
    text, is_prefix = model.get_submodule(vlm.text), "PaliGemma" in type(model).__name__
    hidden, added = oracle.embedded(model, ids, own, deep)
    positions, hidden = oracle.positions_of(model, ids, len(own)), hidden[None]
    columns, before, found = list(range(len(ids))), 0, {}
    for first, number in kept.items():
        here = positions[..., columns]
        own = {"experts": oracle.experts_of(model, ids[columns])}
        hidden = oracle.run_layers(text, hidden, here, before, first, len(columns) * is_prefix, added, **own)
        layer = text.layers[first]
        mask = torch.zeros(1, 1, len(columns), len(columns))
        rotary = text.rotary_emb(hidden, here)
        maps = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)[1]
        score = dict(zip(columns, maps[0, :, -1].mean(0).tolist(), strict=True))
        gone = set()
        for image in images_of(columns, ids, vlm.num_tokens):
            gone |= set(sorted(image, key=lambda column: -score[column])[number:])
        hidden = hidden[:, [place for place, column in enumerate(columns) if column not in gone]]
        columns, before = [column for column in columns if column not in gone], first
        found[first] = columns
    return found


@torch.no_grad()
def staged_logits(model, vlm, ids, own, deep, prompt, kept):
    """Logits after one row (n,) whose first `prompt` tokens lose columns before the layers that `kept` names."""
    text, is_prefix = model.get_submodule(vlm.text), "PaliGemma" in type(model).__name__
    stages = kept_columns(model, vlm, ids[:prompt], own, deep, kept)
    hidden, added = oracle.embedded(model, ids, own, deep)
    positions, hidden = oracle.positions_of(model, ids, len(own)), hidden[None]
    columns, depth = list(range(len(ids))), text.config.num_hidden_layers
    for first, end in zip([0, *stages], [*stages, depth], strict=True):
        if first:
            left = [*stages[first], *range(prompt, len(ids))]
            hidden = hidden[:, [place for place, column in enumerate(columns) if column in left]]
            columns = left
        prefix = sum(column < prompt for column in columns) * is_prefix
        own = {"experts": oracle.experts_of(model, ids[columns])}
        hidden = oracle.run_layers(text, hidden, positions[..., columns], first, end, prefix, added, **own)
    return oracle.logits_of(model, text, hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["one", "ragged_padded"])
def test_several_cuts_equal_the_oracle(family, prompt):
    """Catches ranks of the layer before, cuts that forget an earlier one, and masks or positions of another stage."""
    vlm = VLMS[family]
    model, inputs = vlm.make("eager"), PROMPTS[prompt].inputs(vlm)
    method = PyramidDropProcessor(0.875, cuts=[1, 2, 3])
    kept = {cut: number for cut, number in method.stages(4, vlm.num_tokens).items() if cut}
    with attach(model, method):
        new, logits, _ = generate(model, inputs)
    expected = oracle.generated_logits(model, vlm, inputs, new, kept, logits=staged_logits)
    assert float((logits - expected).abs().max()) < TOLERANCE
    assert float((logits - generate(model, inputs)[1]).abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize("family", UNREAD)
def test_attention_that_cannot_be_read_is_refused_by_attach(family):
    """Catches scores of projections that the model does not use as they are, and a first call that fails."""
    with pytest.raises(ValueError, match="in a way of its own"):
        attach(VLMS[family].make("sdpa"), PyramidDropProcessor(0.5, cuts=[1, 2]))


@pytest.mark.parametrize("method", [PyramidDropProcessor(0.0), VScanProcessor(0.0)])
def test_nothing_removed_is_bit_identical_and_detach_exact(method):
    """Catches a stage that changes the call though every token stays, and hooks that stay."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    # The first call leaves hooks of transformers' own.
    stock, before = generate(model, inputs)[1], model_state(model)
    with attach(model, method):
        assert torch.equal(generate(model, inputs)[1], stock)
    assert differences(before, model_state(model)) == []


def test_a_second_turn_goes_on_with_every_stage():
    """Catches caches of which one stage knows the columns and another does not."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("eager"), PROMPTS["one"].inputs(vlm)
    method = PyramidDropProcessor(0.875, cuts=[1, 2, 3])
    kept = {cut: number for cut, number in method.stages(4, vlm.num_tokens).items() if cut}
    more = torch.tensor([[11, 12, 13]])
    with attach(model, method), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, **{CACHE: cache})
        logits = model(input_ids=more, **{CACHE: cache}).logits[0, -1]
    own, deep = oracle.features_of(model, vlm, inputs)
    row = torch.cat([inputs["input_ids"][0], more[0]])
    expected = staged_logits(model, vlm, row, own, deep, inputs["input_ids"].shape[1], kept)
    assert float((logits - expected).abs().max()) < TOLERANCE


def test_rows_equal_rows_alone():
    """Catches scores of a padded row that count its padding, and budgets of one row used for another."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    for method in (PyramidDropProcessor(0.8), VScanProcessor(0.6)):
        with attach(model, method), torch.no_grad():
            both = model(**inputs).logits[:, -1]
            for row in range(2):
                real = inputs["attention_mask"][row].bool()
                own = {"input_ids": inputs["input_ids"][row, real][None], "pixel_values": inputs["pixel_values"][[row]]}
                assert float((model(**own).logits[0, -1] - both[row]).abs().max()) < TOLERANCE


def test_every_stage_is_counted():
    """Catches savings of one stage counted for the layers of another."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, PyramidDropProcessor(0.875, cuts=[1, 2, 3])), torch.no_grad():
        model(**inputs)
        found = report(model)
    assert [(row.num_tokens, row.num_kept) for row in found.layers] == [(16, 16), (16, 8), (16, 4), (16, 2)]
    length = inputs["input_ids"].shape[1]
    columns = [length, length - 8, length - 12, length - 14]
    assert found.flops_saved == pytest.approx(1 - sum(columns) / (4 * length))
    assert mean_kept(found, 16) == pytest.approx((16 + 8 + 4 + 2) / 4)


def test_vscan_chooses_as_published():
    """Catches windows of other tokens, a local token that is chosen again, and another partner for the rest."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, 64, 8, generator=generator)
    early, late = (torch.rand(1, 64, generator=generator) for _ in range(2))
    site = LayerInfo("pre_llm", 1 - 31.5 / 64, (8, 8), semantic={"early class": early, "class": late}.get)
    plan = VScanProcessor().plan(tokens, site, StepInfo())
    local = [
        max(
            (8 * (2 * row + y) + 2 * column + x for y in (0, 1) for x in (0, 1)),
            key=lambda token: float(early[0, token]),
        )
        for row in range(4)
        for column in range(4)
    ]
    rest = sorted(set(range(64)) - set(local), key=lambda token: -float(late[0, token]))
    kept = sorted([*local, *rest[:16]])
    assert plan.anchor_BM[0].tolist() == kept
    for token in set(range(64)) - set(kept):
        cosines = [float(torch.cosine_similarity(tokens[0, token], tokens[0, other], 0)) for other in kept]
        assert int(plan.slot_BN[0, token]) == max(range(32), key=cosines.__getitem__)


def test_vscan_means_the_mean_over_layers():
    """Catches a budget that is that of the first stage or of the last, and one that a small ratio cannot reach."""
    assert VScanProcessor(keep=64).stages(32, 576) == {0: 96, 16: 32}
    for mean in (500, 300, 64, 8):
        stages = VScanProcessor(keep=mean).stages(32, 576)
        assert (stages[0] + stages[16]) / 2 == pytest.approx(mean, abs=1)
        assert stages[16] <= stages[0] <= 576


def test_pyramids_are_those_of_the_paper():
    """Catches cuts at other layers than a quarter, a half and three quarters, and a share that is not lambda."""
    assert PyramidDropProcessor().stages(32, 576) == {0: 576, 8: 288, 16: 144, 24: 72}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PyramidDropProcessor(cuts=[2, 2]), "ascending"),
        (lambda: PyramidDropProcessor(place="pre_llm"), "decoder"),
        (lambda: VScanProcessor(local=1.5), "local"),
        (lambda: VScanProcessor(place="tower"), "pre_llm"),
        (lambda: attach(VLMS["llava"].make(), PyramidDropProcessor(cuts=[9])), "cut=9"),
        (lambda: attach(VLMS["llava"].make(), VScanProcessor(cut=4)), "cut=4"),
        (lambda: attach(VLMS["aya"].make(), PyramidDropProcessor()), "sliding"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    """Catches stages of a decoder that has none, found out in the middle of a call."""
    with pytest.raises(ValueError, match=message):
        make()


def test_too_small_a_ratio_says_so_once():
    """Catches a warning for every stage that is meant to keep all."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, PyramidDropProcessor(0.01)), pytest.warns(NoEffectWarning, match="raise `ratio`") as told:
        model(**inputs)
    assert len(told) == 1


def test_static_caches_are_refused_before_the_call():
    """Catches layers of one static cache that hold different tokens."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with attach(model, VScanProcessor(0.5)), pytest.raises(ValueError, match="StaticCache"):
        model(**inputs, **{CACHE: cache})
