"""Compiled models: an attachment does what it does in eager mode, whatever was compiled before it came."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from transformers import StaticCache

from gen_turbo import IdentityProcessor, TurboProcessor, attach, report
from gen_turbo.registry import METHODS
from gen_turbo.vlm.cache_argument import CACHE, cache_in
from gen_turbo.vlm.gate import Gate
from gen_turbo.vlm.settings import Placed
from tests.vlm.test_generate import TOLERANCE
from tests.vlm.tiny_vlms import PROMPTS, VLMS

TOWERS = {"llava": "model.vision_tower", "qwen2_5": "model.visual"}
SETTINGS = {
    "tower": ("turbo_vit", {}),
    "pre_llm": ("turbo", {}),
    "grouped": ("vistog_vit", {}),
    "decoder": ("fastv", {}),
    "layers": ("par", {"router": "uniform", "tokens": 0.5, "layers": 3}),
}
CASES = [
    ("llava", "whole", "pre_llm"),
    ("llava", "whole", "grouped"),
    ("llava", "tower", "pre_llm"),
    ("llava", "text", "decoder"),
    ("llava", "text", "layers"),
    ("qwen2_5", "tower", "tower"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize(("family", "part", "place"), CASES)
def test_a_compiled_model_is_reduced_like_an_eager_one(family, part, place):
    """Catches graphs made before the attachment that go on without its hooks, or after it with them.

    The graphs of one block serve its equals too, which carry no hooks or others.
    """
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    name, settings = SETTINGS[place]
    method = METHODS[name](**settings) if settings else METHODS[name](0.6)
    stock = model(**inputs).logits
    lengths = []
    with attach(model, method):
        last = model.get_submodule(vlm.text).layers[3]
        handle = last.mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[:2]))
        eager = model(**inputs).logits
        handle.remove()
    assert (eager - stock).abs().max() > 100 * TOLERANCE
    compiled = {"whole": model, "tower": model.get_submodule(TOWERS[family]), "text": model.get_submodule(vlm.text)}
    compiled[part].compile(backend="eager")
    model.get_submodule(vlm.text).layers[3].mlp.register_forward_hook(
        torch.compiler.disable(lambda module, args, output: lengths.append(output.shape[:2]))
    )
    assert (model(**inputs).logits - stock).abs().max() < TOLERANCE
    with attach(model, method):
        for _ in range(2):
            assert (model(**inputs).logits - eager).abs().max() < TOLERANCE
    assert (model(**inputs).logits - stock).abs().max() < TOLERANCE
    ran, before, *attached, after = lengths
    assert before == after and attached == [ran, ran] and ran.numel() < before.numel()
    assert compiled[part]._compiled_call_impl is not None


@torch.no_grad()
def test_every_layer_of_a_compiled_model_is_compiled_while_attached():
    """Catches a tower in eager code, and modules with hooks that share one frame, whose graphs meet a limit."""
    vlm = VLMS["llava"]
    model, ran = vlm.make("sdpa"), []

    def counted(module, given):
        linear = sum("linear" in str(node.target) for node in module.graph.nodes)

        def run(*args):
            ran.append(linear)
            return module.forward(*args)

        return run

    model.compile(backend=counted, dynamic=False)
    compiled = []
    for prompt in ("one", "even"):
        inputs = PROMPTS[prompt].inputs(vlm)
        for method in (None, METHODS["turbo"](0.6)):
            ran.clear()
            with attach(model, method) if method else contextlib.nullcontext():
                model(**inputs)
            compiled.append(sum(ran))
    # The last block of the tower is read by nobody, and left out.
    unread = num_linear(model.model.vision_tower.encoder.layers[-1])
    assert 0 < unread < compiled[0] and compiled == [compiled[0], compiled[0] - unread] * 2


def num_linear(module):
    """Linear layers of a module."""
    return sum(isinstance(part, nn.Linear) for part in module.modules())


@torch.no_grad()
@pytest.mark.parametrize("method", ["turbo", "turbo_vit"])
def test_a_tower_whose_attention_is_read_stays_one_graph(method):
    """Catches hooks that break the tower's graph: every layer of it is then launched, and captured, on its own."""
    vlm, ran = VLMS["llava"], []

    def counted(graph, given):
        return lambda *args: ran.append(graph) or graph.forward(*args)

    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    reducer = METHODS[method](**{"ratio": 0.6} | ({"place": "pre_llm"} if method == "turbo_vit" else {}))
    with attach(model, reducer):
        expected = model(**inputs).logits
    tower = model.model.vision_tower
    tower.compile(backend=counted, dynamic=False)
    with attach(model, reducer):
        for _ in range(2):
            ran.clear()
            assert (model(**inputs).logits - expected).abs().max() < TOLERANCE
    assert len(ran) == 1


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_tower_that_merges_is_one_graph_of_a_compiled_model(cache):
    """Catches hooks of blocks that break the graph, several per block, and a lock or a context variable in their way.

    Also graphs of one prompt that merge the next one as they did the first, and merges that nobody counts.
    """
    vlm, ran = VLMS["llava"], []
    model, prompts = vlm.make("sdpa"), [PROMPTS[name].inputs(vlm) for name in ("one", "even")]

    def counted(module, given):
        linear = sum("linear" in str(node.target) for node in module.graph.nodes)
        return lambda *args: ran.append(linear) or module.forward(*args)

    def logits(inputs):
        held = {CACHE: StaticCache(config=model.config.text_config, max_cache_len=64)} if cache == "static" else {}
        return model(**inputs, **held).logits

    stock = logits(prompts[0])
    with attach(model, METHODS["turbo_vit"](0.6)):
        expected, eager = [logits(one) for one in prompts], report(model).layers
    assert (expected[0] - stock).abs().max() > 100 * TOLERANCE
    model.compile(backend=counted)
    with attach(model, METHODS["turbo_vit"](0.6)):
        for one, right in zip(prompts, expected, strict=True):
            ran.clear()
            assert (logits(one) - right).abs().max() < TOLERANCE
            blocks = model.model.vision_tower.encoder.layers[:-1]
            assert max(ran[: len(ran) // 2]) == num_linear(blocks)
            assert len(ran) <= 8
        assert report(model).layers == eager


IDLE = {
    "identity": IdentityProcessor(0.5),
    "ratio 0": TurboProcessor(0.0),
    "tower": Placed(IdentityProcessor(0.5), place="tower"),
    "decoder": Placed(TurboProcessor(0.0), place="decoder"),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "name"), [("llava", "identity"), ("llava", "decoder"), ("internvl", "tower"), ("idefics3", "ratio 0")]
)
def test_one_graph_holds_a_model_of_which_nothing_is_removed(family, name):
    """Catches hooks that do nothing and yet break the graph, for which `fullgraph=True` refuses the model."""
    model, inputs = VLMS[family].make("sdpa"), PROMPTS["even"].inputs(VLMS[family])
    stock = model(**inputs).logits
    with attach(model, IDLE[name]):
        assert torch.equal(torch.compile(model.forward, backend="eager", fullgraph=True)(**inputs).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5"])
def test_graphs_without_hooks_serve_nothing_but_what_removes_nothing(family):
    """Catches graphs that left hooks out and go on once tokens are to leave, and calls that begin and never end."""
    model, inputs = VLMS[family].make("sdpa"), PROMPTS["one"].inputs(VLMS[family])
    stock = model(**inputs).logits
    with attach(model, TurboProcessor(0.6)):
        reduced = model(**inputs).logits
    model.compile(backend="eager")
    for method, expected in [
        (IdentityProcessor(), stock),
        (TurboProcessor(0.6), reduced),
        (TurboProcessor(0.0), stock),
    ]:
        with attach(model, method) as attachment:
            for _ in range(2):
                assert (model(**inputs).logits - expected).abs().max() < TOLERANCE
                assert not attachment.parts[0].stage(Gate)._calls.is_running
    assert (reduced - stock).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_a_compiled_call_without_hooks_refuses_a_shortened_cache():
    """Catches a step that goes on with fewer columns than its mask says, because no hook tells it."""
    model, inputs = VLMS["llava"].make("sdpa"), PROMPTS["padded"].inputs(VLMS["llava"])
    with attach(model, TurboProcessor(0.6)):
        cache = cache_in(model(**inputs))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": mask, CACHE: cache}
    with attach(model, IdentityProcessor()), pytest.raises(ValueError, match="a reducer that removes tokens"):
        torch.compile(model.forward, backend="eager")(**step)


@torch.no_grad()
def test_a_stock_model_beside_an_attached_one_keeps_its_graphs():
    """Catches graphs of an attached model that serve another one of its class, and the other way round."""
    vlm = VLMS["llava"]
    attached, stock, inputs = vlm.make("sdpa"), vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    expected = stock(**inputs).logits
    models = [torch.compile(one, backend="eager") for one in (attached, stock)]
    with attach(attached, METHODS["turbo"](0.6)):
        reduced = attached(**inputs).logits
        for _ in range(2):
            assert (models[0](**inputs).logits - reduced).abs().max() < TOLERANCE
            assert (models[1](**inputs).logits - expected).abs().max() < TOLERANCE
    assert (reduced - expected).abs().max() > 100 * TOLERANCE
