"""Smaller images before the vision tower: what is read is what the model reads of a smaller image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.methods.resize import ResizeProcessor
from gen_turbo.tokens.select import shrink_cells, shrunk_grid
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm import oracle
from tests.vlm.test_blip import MODELS, run
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.tiny_kit import pixels
from tests.vlm.tiny_vlms import PROMPTS, VLMS

FAMILIES = ["llava", "llava_siglip", "paligemma"]


def smaller(images, side):
    """Images of `side` x `side` patches of 8 pixels."""
    return F.interpolate(images, (8 * side, 8 * side), mode="bicubic", antialias=True)


def cell_by_cell(num_tokens, num_cells):
    """The cell in which each token's middle lies, and the token in which each cell's middle lies."""
    cells = [int((token + 0.5) / num_tokens * num_cells) for token in range(num_tokens)]
    return cells, [int((cell + 0.5) / num_cells * num_tokens) for cell in range(num_cells)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["one", "ragged_padded"])
@pytest.mark.parametrize(("ratio", "side"), [(0.4, 3), (0.75, 2)])
def test_the_language_model_reads_the_smaller_image(family, prompt, ratio, side):
    """Catches a full-size image whose tokens are dropped, tokens in another order, and other positions."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    cells, middles = cell_by_cell(4, side)
    slot = torch.tensor([[row * side + column for row in cells for column in cells]])
    anchor = torch.tensor([[row * 4 + column for row in middles for column in middles]])
    plan = oracle.TokenMap(slot, anchor)
    small = smaller(inputs["pixel_values"], side)
    with torch.no_grad():
        kwargs = {"interpolate_pos_encoding": True, "output_hidden_states": True}
        out = model.model.vision_tower(small, **kwargs)
        is_llava = family != "paligemma"
        hidden = out.hidden_states[-2] if is_llava else out.last_hidden_state
        own = model.model.multi_modal_projector(hidden[:, 1:] if family == "llava" else hidden)
        features = [one[slot[0]] for one in own]
    with attach(model, ResizeProcessor(ratio)):
        new, logits, _ = generate(model, inputs)
        rows = {row.name: (row.num_tokens, row.num_kept) for row in report(model).layers}
    expected = oracle.generated_logits(
        model, vlm, inputs, new, oracle.Method(lambda tokens: plan, 0, False), (features, [])
    )
    assert (logits - expected).abs().max() < TOLERANCE
    count = len(small)
    assert rows == {
        "model.vision_tower": (16, side**2),
        "model.language_model": (16 * count, side**2 * count),
    }


@pytest.mark.parametrize("name", ["caption", "blip2"])
def test_text_that_reads_on_the_side_gets_fewer_tokens(name):
    """Catches a restored tower where nothing needs it."""
    model = MODELS[name]()
    with torch.no_grad():
        expected = model.vision_model(smaller(pixels(2), 2), interpolate_pos_encoding=True).last_hidden_state
    stock = run(name, model)
    with attach(model, ResizeProcessor(0.75)):
        with torch.no_grad():
            assert torch.equal(model.vision_model(pixels(2)).last_hidden_state, expected)
        assert (run(name, model) - stock).abs().max() > 0.01
    assert torch.equal(run(name, model), stock)


def test_ratio_0_is_bit_identical_and_detach_exact():
    """Catches resampling to the same size, and a hook that stays."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["even"].inputs(vlm)
    with torch.no_grad():
        stock, before = model(**inputs).logits, model_state(model)
        for processor in (ResizeProcessor(0.0), Placed(IdentityProcessor(0.5), place="input")):
            with attach(model, processor):
                assert torch.equal(model(**inputs).logits, stock)
        with attach(model, ResizeProcessor(0.5)):
            assert not torch.equal(model(**inputs).logits, stock)
            with pytest.raises(RuntimeError):
                model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :2]})
        assert torch.equal(model(**inputs).logits, stock)
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize(
    "family",
    ["llava_next", "llava_onevision", "mistral3", "llava_pixtral", "aya", "gemma3", "qwen2_5", "internvl", "idefics3"],
)
def test_towers_that_cannot_are_refused(family):
    """Catches an image that the model reads at full size in silence."""
    with pytest.raises(ValueError, match="reads no smaller images; use the method pool instead"):
        attach(VLMS[family].make("sdpa"), ResizeProcessor(0.5))


def test_without_a_image_it_is_refused():
    """Catches resizing of tokens, which would be another method."""
    with pytest.raises(ValueError, match="use pool"):
        ResizeProcessor(0.5).plan_tokens(torch.zeros(1, 16, 4), (4, 4))
    with pytest.raises(ValueError, match="place must be 'input', got 'pre_llm'"):
        ResizeProcessor(0.5, place="pre_llm")


@pytest.mark.parametrize("grid", [(16, 16), (24, 24), (7, 9), (1, 5), (90, 1), (70, 3), (3, 70)])
def test_the_smaller_grid_keeps_its_shape_and_the_budget(grid):
    """Catches more tokens than asked for, a quarter that is not half of each side, and an image that is squeezed."""
    total = grid[0] * grid[1]
    for kept in range(1, total + 1):
        rows, columns = shrunk_grid(grid, kept)
        assert 1 <= rows * columns <= kept
        assert rows <= grid[0] and columns <= grid[1]
        plan = shrink_cells(grid, (rows, columns))
        assert (plan.num_tokens, plan.num_slots) == (total, rows * columns)
        assert torch.equal(plan.slot_BN.gather(1, plan.anchor_BM), torch.arange(plan.num_slots)[None])
    assert shrunk_grid((16, 16), 64) == (8, 8)
    assert shrunk_grid((24, 24), 192) == (13, 13)
    assert shrunk_grid(grid, total) == grid
