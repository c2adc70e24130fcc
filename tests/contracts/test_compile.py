"""An attached reducer under torch.compile: the same result, one graph for every kind of step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import _dynamo
from torch._dynamo.utils import counters

from gen_turbo import TurboProcessor, attach
from tests import tiny_transformers
from tests.engine.families import relative
from tests.tiny_hosts import TEXT_WIDTH, picture, run_unet, sd_pipeline, unet_inputs

TIMES = (900, 800, 700, 600, 500)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _dynamo.reset()
    counters.clear()
    yield
    _dynamo.reset()


def num_graphs() -> int:
    """Graphs compiled so far in this test."""
    return counters["stats"]["unique_graphs"]


def one_level() -> UNet2DConditionModel:
    """Three transformer blocks on the full grid and no more, for tracing takes the time."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        layers_per_block=1,
        block_out_channels=(16,),
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    ).eval()


def run(model):
    """Five steps of two pictures."""
    return run_unet(model, TIMES, **unet_inputs())


def test_one_graph_serves_every_kind_of_step():
    """Catches Python that asks for the step inside the graph: a graph per step, or one plan for ever."""
    unet = one_level()
    stock = run(unet)
    with attach(unet, TurboProcessor(0.5)), _dynamo.config.patch(error_on_recompile=True):
        expected = run(unet)
        compiled = torch.compile(lambda *args, **kwargs: unet(*args, **kwargs), backend="eager", fullgraph=True)
        assert not torch.equal(expected, stock)
        assert torch.equal(run(compiled), expected)
        assert torch.equal(run(compiled), expected)
    assert num_graphs() == 1 and not counters["graph_break"]


def test_attach_and_detach_after_compile():
    """Catches a graph that keeps running what was attached, or what was not yet attached, when it was made."""
    unet = one_level()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    stock = run(unet)
    assert torch.equal(run(compiled), stock)
    with attach(compiled, TurboProcessor(0.5, restore="copy", match_every=3)):
        expected = run(unet)
        assert torch.equal(run(compiled), expected) and not torch.equal(expected, stock)
    assert torch.equal(run(compiled), stock)


def test_a_pipeline_with_a_compiled_unet():
    """Catches a wrapper that `torch.compile` returns being refused, and operators that a backend reorders or drops."""
    pipe = sd_pipeline()
    pipe.unet = one_level()
    stock = picture(pipe, steps=5)
    pipe.set_attn_processor(TurboProcessor(0.5))
    expected = picture(pipe, steps=5)
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    pipe.set_attn_processor(TurboProcessor(0.5))
    with _dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(picture(pipe, steps=5), expected) and torch.equal(picture(pipe, steps=5), expected)
    assert num_graphs() == 3  # PyTorch calls the hooks of what it compiled outside: each is a graph of one operator.
    pipe.reset_attn_processor()
    assert torch.equal(picture(pipe, steps=5), stock)


def test_what_no_graph_holds_breaks_it_and_is_traced_once():
    """Catches blocks whose state is traced: a graph per step, until PyTorch gives up and compiles no more."""
    unet = one_level()
    compiled = torch.compile(unet, backend="eager")
    with attach(unet, TurboProcessor(0.5, scope="block")):
        expected = run(unet)
        assert torch.equal(run(compiled), expected)
        seen = num_graphs()
        assert torch.equal(run(compiled), expected) and num_graphs() == seen
        _dynamo.reset()
        with pytest.raises(_dynamo.exc.Unsupported, match="without fullgraph"):
            run_unet(torch.compile(unet, backend="eager", fullgraph=True), TIMES[:1], **unet_inputs())


def test_compiled_blocks_of_a_unet_share_one_graph():
    """Catches a graph for each block, which ends in no graph at all when there are more blocks than PyTorch allows."""
    unet = one_level()
    stock = run(unet)
    with attach(unet, TurboProcessor(0.5)), _dynamo.config.patch(error_on_recompile=True):
        expected = run(unet)
        unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        assert relative(run(unet), expected) < 1e-5 and relative(run(unet), expected) < 1e-5
        assert relative(expected, stock) > 1e-3
    assert num_graphs() == 1 and not counters["graph_break"]
    assert relative(run(unet), stock) < 1e-5


@pytest.mark.parametrize(
    ("name", "settings"), [("flux", {}), ("wan", {"restore": "copy", "match_every": 2, "proportional_attention": True})]
)
def test_compiled_blocks_of_a_transformer_share_the_graphs_of_the_stock_model(name, settings):
    """Catches text, positions or a mask that end a graph, outputs that share memory, and a graph per kind of step."""
    model = tiny_transformers.build(name)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    stock, num_stock = tiny_transformers.run(name, model), num_graphs()
    model = tiny_transformers.build(name)
    _dynamo.reset()
    with attach(model, TurboProcessor(0.4, **settings)):
        expected = tiny_transformers.run(name, model)
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            assert relative(tiny_transformers.run(name, model), expected) < 1e-5
    assert relative(expected, stock) > 1e-3
    assert num_graphs() == 2 * num_stock and not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_gradients_go_through_compiled_blocks_outside_of_graphs():
    """Catches an operator without gradients where they are wanted."""
    model = tiny_transformers.build("flux")
    kind, latents = tiny_transformers.FAMILIES["flux"], tiny_transformers.random(1, 64, 8).requires_grad_()
    call = kind.inputs(1, (8, 8)) | kind.time(900, 1)
    gradients = []
    with attach(model, TurboProcessor(0.4, restore="copy")):
        for compiles in (False, True):
            if compiles:
                model.compile_repeated_blocks(backend="eager")
            output = model(hidden_states=latents, **call, return_dict=False)[0]
            gradients += torch.autograd.grad(output.square().sum(), latents)
    torch.testing.assert_close(*gradients)
