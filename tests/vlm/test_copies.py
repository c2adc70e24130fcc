"""Copies of attached vision-language models are stock and their own; what others place on them stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

from gen_turbo import PARProcessor, TurboProcessor, attach, load_pipeline, report
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm.tiny_vlms import PROMPTS, VLMS

PLACES = {
    "gate": TurboProcessor(0.6),
    "words": TurboProcessor(0.6, text_ratio=0.5),
    "decoder": Placed(TurboProcessor(0.6), place="decoder"),
    "tower": Placed(TurboProcessor(0.6), place="tower"),
    "groups": VisToGVisionProcessor(0.6),
}
CASES = [
    *(("llava", place) for place in PLACES),
    *((family, place) for family in ("qwen2_5", "qwen3") for place in ("gate", "decoder", "tower")),
    ("paligemma", "gate"),
    ("internvl", "tower"),
    ("idefics3", "gate"),
]


def made(family):
    """A model, and a function that gives the logits of any such model."""
    vlm = VLMS[family]
    inputs = PROMPTS["one"].inputs(vlm)

    @torch.no_grad()
    def run(model):
        return model(**inputs).logits

    return vlm.make(), run


@torch.no_grad()
def changed(model):
    """The model with other weights."""
    for weight in model.parameters():
        weight.mul_(0.9)
    return model


@pytest.mark.parametrize(("family", "place"), CASES)
def test_a_copy_is_stock_and_is_attached_to_on_its_own(family, place):
    """Catches hooks that call what belongs to the original, and copies that no hook ever leaves again."""
    model, run = made(family)
    stock, expected = run(model), run(changed(made(family)[0]))
    attachment = attach(model, PLACES[place])
    reduced = run(model)
    twin = changed(copy.deepcopy(model))
    assert not torch.equal(reduced, stock) and torch.equal(run(twin), expected)
    assert report(twin).layers == [] and torch.equal(run(model), reduced)
    before = model_state(twin)
    with attach(twin, PLACES[place]):
        alone = run(twin)
        attachment.detach()
        assert torch.equal(run(model), stock) and torch.equal(run(twin), alone)
    # Qwen models keep the last prompt's offset themselves.
    assert torch.equal(run(twin), expected) and set(differences(before, model_state(twin))) <= {"model.rope_deltas"}
    fresh = changed(made(family)[0])
    with attach(fresh, PLACES[place]):
        assert torch.equal(run(fresh), alone)


@pytest.mark.parametrize(("family", "place"), [("llava", "gate"), ("qwen2_5", "tower"), ("internvl", "tower")])
def test_a_copy_outlives_the_original_and_has_its_own_type(family, place):
    """Catches a copy that needs the original, or keeps it alive, and one whose methods are bound to the first type."""
    model, run = made(family)
    stock = run(model)
    attach(model, PLACES[place])
    run(model)
    twin, gone = copy.deepcopy(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and torch.equal(run(twin), stock)
    torch.testing.assert_close(run(twin.double()).float(), stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_pickling_is_refused_in_words(place):
    """Catches a complaint about local functions that tells nobody what to do."""
    model, _ = made("llava")
    with attach(model, PLACES[place]):
        for save in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(TypeError, match=r"call gen_turbo\.detach before"):
                save(model)
    pickle.dumps(model)


@pytest.mark.parametrize(
    "processor",
    [PARProcessor(budget=0.6), VisToGVisionProcessor(weights="embedded:vistog/tiny-vlm-64"), TurboVisionProcessor()],
    ids=lambda processor: type(processor).__name__,
)
def test_a_copy_of_a_captioning_pipeline(processor, photo):
    """Catches a copied pipeline that asks the original's router, and learned weights shared with the original."""
    pipe = load_pipeline("caption", processor=None)
    stock = pipe(photo).texts
    with attach(pipe.vlm, processor):
        reduced = pipe(photo).texts
        twin = copy.deepcopy(pipe)
        assert twin(photo).texts == stock
        with attach(twin.vlm, processor):
            assert twin(photo).texts == reduced
        assert twin(photo).texts == stock and pipe(photo).texts == reduced
    assert pipe(photo).texts == stock


@pytest.fixture(scope="module")
def photo():
    """An image that the embedded model can read."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (128, 128, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.mark.parametrize(("family", "place"), [("llava", "gate"), ("internvl", "tower")])
def test_wrappers_of_others_survive(family, place):
    """Catches a detach that deletes what somebody else has placed over ours, or leaves ours at work under it."""
    model, run = made(family)
    stock, calls = run(model), []
    attachment = attach(model, PLACES[place])
    layer = model.get_submodule("model.vision_tower.encoder.layer.0.attention") if family == "internvl" else None
    for owner, name in [(model.model, "get_image_features")] + ([(layer, "forward")] if layer is not None else []):
        ours = getattr(owner, name)

        def wrapper(*args, ours=ours, name=name, **kwargs):
            calls.append(name)
            return ours(*args, **kwargs)

        setattr(owner, name, wrapper)
    assert not torch.equal(run(model), stock) and calls
    attachment.detach()
    calls.clear()
    assert torch.equal(run(model), stock) and set(calls) == {"get_image_features", *(["forward"] if layer else [])}
