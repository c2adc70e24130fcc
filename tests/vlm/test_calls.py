"""Calls that run at once, in turn or inside each other: each gives what it would alone."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
import torch

from gen_turbo import (
    IdentityProcessor,
    PARProcessor,
    RandomProcessor,
    ToMeProcessor,
    TurboProcessor,
    VisToGProcessor,
    attach,
    report,
)
from gen_turbo.registry import METHODS
from gen_turbo.vlm.gate import Gate
from gen_turbo.vlm.settings import Placed
from tests.vlm.test_blip import MODELS
from tests.vlm.tiny_vlms import PROMPTS, VLMS

CALLS = 40
PROCESSORS = {
    "identity": IdentityProcessor(0.5),
    "turbo": TurboProcessor(0.6),
    "turbo decoder": Placed(TurboProcessor(0.6), place="decoder"),
    "turbo tower": Placed(TurboProcessor(0.6), place="tower"),
    "turbo projector": Placed(TurboProcessor(0.6), place="projector"),
    "turbo words": TurboProcessor(0.6, text_ratio=0.4),
    "tome": ToMeProcessor(0.6),
    "vistog": VisToGProcessor(0.6),
    "random": RandomProcessor(0.6),
    "par": PARProcessor(router="random", tokens=0.5, layers=3, first=1),
    "par mask": PARProcessor(router="random", tokens=0.5, layers=3, mode="mask"),
    **{
        name: METHODS[name](0.6) for name in ("divprune", "fastv", "pool", "resize", "stride", "turbo_vit", "visionzip")
    },
    "turbo_vit pre_llm": METHODS["turbo_vit"](0.6, place="pre_llm"),
    "vistog_vit": METHODS["vistog_vit"](0.5),
    "adaptive": METHODS["divprune"](keep=6, adaptive=True),
    "eadaprune": METHODS["eadaprune"](energy=0.5),
    "pyramiddrop": METHODS["pyramiddrop"](0.6, cuts=[1]),
    "vscan": METHODS["vscan"](0.6),
}


def test_every_method_is_here():
    """Catches a method that is added and never run by two threads."""
    assert {type(one.reducer if isinstance(one, Placed) else one) for one in PROCESSORS.values()} == {
        METHODS[name] for name in METHODS.names() if name != "own"
    }


def prompts(vlm, seed):
    """Prompts of several shapes whose images no other seed has."""
    made = [PROMPTS[name].inputs(vlm, seed) for name in ("one", "padded", "ragged_padded")]
    for one in made:
        noise = torch.randn(one["pixel_values"].shape, generator=torch.Generator().manual_seed(seed))
        one["pixel_values"] = one["pixel_values"] + noise
    return made


@torch.no_grad()
def logits(model, inputs):
    """What one call without a cache says."""
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", PROCESSORS)
def test_two_threads_on_one_model(name):
    """Catches plans, masks, cuts, sizes and routes of one call kept where the call of another thread writes."""
    vlm = VLMS["llava"]
    model, work, wrong = vlm.make("sdpa"), {seed: prompts(vlm, seed) for seed in (1, 2)}, []
    with attach(model, PROCESSORS[name]):
        alone = {seed: [logits(model, one) for one in made] for seed, made in work.items()}

        def many(seed):
            for number in range(CALLS):
                at = number % len(work[seed])
                try:
                    if not torch.equal(logits(model, work[seed][at]), alone[seed][at]):
                        wrong.append((seed, number))
                except Exception as error:
                    wrong.append((seed, number, repr(error)))

        threads = [threading.Thread(target=many, args=(seed,)) for seed in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        calls = {row.num_full + row.num_reduced for row in report(model).layers}
    assert not wrong
    if name not in ("turbo tower", "turbo_vit", "par", "par mask"):
        # Towers count blocks, routers themselves too; a lost update shows in the others.
        assert max(calls) == 2 * CALLS + 2 * 3


def _nest(name, place, seed):
    """Calls the model again when a module of it is called; both calls give what each gives alone."""
    vlm = VLMS["llava"]
    model, (one, _, three) = vlm.make("sdpa"), prompts(vlm, seed)
    with attach(model, PROCESSORS[name]):
        expected, inside = logits(model, three), logits(model, one)
        seen = []

        def inner(module, args):
            handle.remove()
            seen.append(logits(model, one))

        handle = model.get_submodule(place).register_forward_pre_hook(inner)
        assert torch.equal(logits(model, three), expected)
        assert torch.equal(seen[0], inside)


@pytest.mark.parametrize("name", ["turbo", "turbo decoder", "par", "turbo words"])
def test_a_call_inside_a_call(name):
    """Catches a state that the inner call overwrites, and one that it leaves behind for the outer to go on with."""
    _nest(name, "model.language_model.layers.0", seed=3)


@pytest.mark.parametrize("name", ["turbo tower", "turbo_vit", "vistog_vit", "resize"])
def test_a_call_inside_the_vision_tower(name):
    """Catches merges, masks and semantic tokens of the image that a hook in the tower has the model read meanwhile."""
    _nest(name, "model.vision_tower.encoder.layers.1.layer_norm1", seed=5)


@pytest.mark.parametrize("name", ["turbo", "turbo tower", "turbo_vit", "visionzip", "resize"])
def test_a_call_between_the_tower_and_the_end_of_its_features(name):
    """Catches attention and plans of the inner call's image, which the outer call reads as its own."""
    _nest(name, "model.multi_modal_projector", seed=5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["turbo", "turbo decoder", "turbo tower", "visionzip", "par", "pyramiddrop"])
def test_a_logits_processor_that_asks_the_model(name):
    """Catches what the processor's own prompt leaves behind for the steps of the generation around it."""
    vlm = VLMS["llava"]
    model, (one, _, three) = vlm.make("sdpa"), prompts(vlm, 6)
    seen = []

    def ask(ids, scores):
        seen.append(logits(model, one))
        return scores

    settings = {"max_new_tokens": 4, "do_sample": False}
    with attach(model, PROCESSORS[name]):
        expected, inside = model.generate(**three, **settings), logits(model, one)
        assert torch.equal(model.generate(**three, **settings, logits_processor=[ask]), expected)
    assert len(seen) == 4 and all(torch.equal(found, inside) for found in seen)


@pytest.mark.parametrize("name", ["turbo tower", "turbo words", "visionzip", "par", "vistog_vit"])
def test_tasks_whose_calls_run_in_threads(name):
    """Catches the state of one task's call in a thread that a task of another context hands its call to."""
    vlm = VLMS["llava"]
    model, work = vlm.make("sdpa"), {seed: prompts(vlm, seed) for seed in (1, 2, 3)}

    async def read(seed):
        return [await asyncio.to_thread(logits, model, work[seed][at % 3]) for at in range(6)]

    async def every():
        return await asyncio.gather(*map(read, work))

    with attach(model, PROCESSORS[name]):
        alone = {seed: [logits(model, one) for one in made] for seed, made in work.items()}
        found = asyncio.run(every())
    for seed, answers in zip(work, found, strict=True):
        assert all(torch.equal(answer, alone[seed][at % 3]) for at, answer in enumerate(answers))


def test_tasks_that_take_turns():
    """Catches features of one task's images taken for those of another, which encoded its own in between."""
    vlm = VLMS["llava"]
    model, (one, _, three) = vlm.make("sdpa"), prompts(vlm, 4)

    async def read(inputs):
        with torch.no_grad():
            encoded = model.get_image_features(pixel_values=inputs["pixel_values"])
        await asyncio.sleep(0)
        text = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with torch.no_grad():
            return model(**text, mm_encoder_outputs={"image": encoded}, use_cache=False).logits

    async def both():
        return await asyncio.gather(read(one), read(three))

    with attach(model, METHODS["visionzip"](0.6)):
        expected = [logits(model, one), logits(model, three)]
        found = asyncio.run(both())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_threads_where_text_reads_by_cross_attention():
    """Catches the tower's plan of another thread's images."""
    model = MODELS["caption"]()
    ids = torch.tensor([[1, 5, 6, 7]])
    pixels = {seed: torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)}
    wrong = []

    @torch.no_grad()
    def run(seed):
        return model(input_ids=ids.expand(2, -1), pixel_values=pixels[seed]).logits

    with attach(model, METHODS["turbo_vit"](0.5)):
        alone = {seed: run(seed) for seed in pixels}

        def many(seed):
            wrong.extend(seed for _ in range(CALLS) if not torch.equal(run(seed), alone[seed]))

        threads = [threading.Thread(target=many, args=(seed,)) for seed in pixels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_nothing_is_kept_of_a_stage_that_is_gone_or_of_a_failed_call():
    """Catches context variables that hold tensors for as long as their thread lives, and states that pile up."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    attachment = attach(model, TurboProcessor(0.6))
    handle = model.model.language_model.layers[1].register_forward_pre_hook(lambda layer, args: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            logits(model, inputs)
    handle.remove()
    gate = attachment.parts[0].stage(Gate)
    assert not gate._calls.is_running
    seen = weakref.ref(gate)
    attachment.detach()
    del attachment, gate
    gc.collect()
    assert seen() is None
