"""An attached reducer under torch.compile: bit by bit as eager, few graphs, no break, whenever it is attached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from stated import TurboProcessor
from torch import Tensor, _dynamo, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import get_first_incompatible_cudagraph_node

from gen_turbo import PARProcessor, attach, report
from gen_turbo.training.schedule import BRANCH, Schedule
from gen_turbo.training.schedule_file import ScheduleFile, probe_of
from tests import tiny_transformers
from tests.engine.families import family
from tests.schedules import by_hand
from tests.snapshots import differences, model_state
from tests.tiny_flux import flux
from tests.tiny_hosts import TEXT_WIDTH, image, run_unet, sd_pipeline, unet_inputs
from tests.tiny_transformers import FAMILIES, random

TIMES = tuple(range(900, 300, -50))
"""Twelve steps."""
MOST = 4
"""Graphs of a run of the whole model."""
SETTINGS: dict[str, dict[str, object]] = {
    "residual": {},
    "copied": {"restore": "copy"},
    "block": {"scope": "block"},
    "block copied": {"scope": "block", "restore": "copy"},
    "levels copied": {"scope": "block", "restore": "copy", "max_downsample": 4},
    "model": {"scope": "model"},
    "model copied": {"scope": "model", "restore": "copy"},
    "sizes": {"restore": "copy", "proportional_attention": True},
    "weighed": {"restore": "copy", "proportional_attention": True, "text_ratio": 0.4, "match_every": 3},
}
WHOLE = [
    ("unet", "block copied"),
    ("sd3", "weighed"),
    ("flux", "block"),
    ("flux", "model"),
    ("pixart-sigma", "residual"),
    ("pixart-sigma", "model copied"),
    ("wan", "copied"),
    ("flux2", "residual"),
    ("kandinsky5", "residual"),
    ("skyreels-v2-forcing", "copied"),
]
IN_OPERATORS = [
    ("unet", "block copied"),
    ("sd3", "weighed"),
    ("flux", "block"),
    ("pixart-sigma", "residual"),
    ("pixart-sigma", "model copied"),
    ("wan", "copied"),
]
"""Of these, those that are traced down to operators: at least one of each model."""
BLOCKS = [
    ("unet", "copied"),
    ("unet", "block"),
    ("flux", "residual"),
    ("pixart-sigma", "block"),
    ("wan", "block copied"),
    ("wan", "sizes"),
    ("sd3", "model copied"),
    ("deep flux", "model"),
    ("sd15", "levels copied"),
    ("flux2", "block copied"),
    ("aura-flow", "block copied"),
    ("qwen-image-2.1", "weighed"),
    ("hunyuan-video-1.5", "block copied"),
    ("kandinsky5", "block"),
    ("ltx2", "block copied"),
    ("wan-vace", "block copied"),
    ("flux3", "block"),
    ("ernie-image", "block copied"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _dynamo.reset()
    counters.clear()
    # What PyTorch writes while it traces would fill the screen when a test fails.
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)
    _dynamo.reset()


class Backend:
    """Runs what was traced as it is, and keeps it.

    Args:
        in_operators: Whether it is traced down to the operators of PyTorch.
    """

    def __init__(self, in_operators: bool = False) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._inner = aot_autograd(fw_compiler=self._keep) if in_operators else self._keep

    def __call__(self, graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        return self._inner(graph, inputs)

    def _keep(self, graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        self.graphs.append(graph)
        return graph.forward


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


def made(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model and what runs it on one image."""
    if name == "unet":
        unet = one_level()
        return unet, lambda times=TIMES, model=unet: run_unet(model, times, **unet_inputs(1))
    if name == "deep flux":
        torch.manual_seed(0)
        deep = flux(2, 3).eval()
        return deep, lambda times=TIMES: tiny_transformers.run("flux", deep, times, 1)
    model, run = family(name)
    return model, lambda times=TIMES: run(times=times, batch=1)


@pytest.mark.parametrize(("name", "kind"), WHOLE)
def test_a_compiled_model_is_the_eager_one_in_few_graphs(name, kind):
    """Catches Python in a layer that asks for the step: a graph per step, a break, one plan for ever, a host wait."""
    model, run = made(name)
    with attach(model, TurboProcessor(0.4, **SETTINGS[kind])):
        expected = run()
        backend = Backend((name, kind) in IN_OPERATORS)
        model.compile(backend=backend, fullgraph=True)
        assert torch.equal(run(), expected)
        assert 1 < len(backend.graphs) <= MOST
        seen = len(backend.graphs)
        assert torch.equal(run(), expected)
        assert len(backend.graphs) == seen and not counters["graph_break"]
        assert all(layer.num_reduced > 8 for layer in report(model).layers if layer.status == "reduced")
    if (name, kind) in IN_OPERATORS:
        assert [node for node in map(get_first_incompatible_cudagraph_node, backend.graphs) if node is not None] == []


@pytest.mark.parametrize(("name", "kind"), BLOCKS)
def test_compiled_blocks_are_the_eager_ones(name, kind):
    """Catches a graph for each block, or for each step, and a class whose blocks diffusers does not name.

    Also blocks of two kinds of which the image is another output, in a graph that takes that place for a symbol.
    """
    model, run = made(name)
    before = vars(model).get("_repeated_blocks")
    with attach(model, TurboProcessor(0.4, **SETTINGS[kind])):
        expected = run()
        backend = Backend()
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        assert torch.equal(run(), expected)
        seen = len(backend.graphs)
        assert torch.equal(run(), expected)
        assert 1 < len(backend.graphs) == seen and not counters["graph_break"]
    assert vars(model).get("_repeated_blocks") is before


def test_some_blocks_may_be_compiled():
    """Catches a graph that asks for positions which a block that is not compiled has kept."""
    model, run = made("flux2")
    with attach(model, TurboProcessor(0.4, **SETTINGS["block copied"])):
        expected = run(times=TIMES[:3])
        backend = Backend()
        for block in model.single_transformer_blocks:
            block.compile(backend=backend, fullgraph=True)
        assert torch.equal(run(times=TIMES[:3]), expected) and backend.graphs


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "unet"])
def test_repeated_blocks_are_named_while_attached(name):
    """Catches a name that stays on the model, and one that hides diffusers' own."""
    model, _ = made(name)
    named, before = getattr(model, "_repeated_blocks", None), model_state(model)
    with attach(model, TurboProcessor(0.4)):
        block = next(m for n, m in model.named_modules() if n.rpartition(".")[0].endswith("transformer_blocks"))
        assert model._repeated_blocks == (named or [type(block).__name__])
    assert getattr(model, "_repeated_blocks", None) == named and differences(before, model_state(model)) == []
    if not named:
        with pytest.raises(ValueError, match="_repeated_blocks"):
            model.compile_repeated_blocks()


def test_a_pipeline_with_a_unet_that_was_compiled_before():
    """Catches a graph that keeps running what was attached or was not, a wrapper that is refused, a run not found."""
    pipe = sd_pipeline()
    pipe.unet = one_level()
    stock = image(pipe, steps=6)
    pipe.set_attn_processor(TurboProcessor(0.5))
    expected = image(pipe, steps=6)
    pipe.reset_attn_processor()
    backend = Backend()
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    assert torch.equal(image(pipe, steps=6), stock) and len(backend.graphs) == 1
    pipe.set_attn_processor(TurboProcessor(0.5))
    assert torch.equal(image(pipe, steps=6), expected) and report(pipe).remembered_bytes == 0
    seen = len(backend.graphs)
    assert torch.equal(image(pipe, steps=6), expected)
    assert 1 < seen == len(backend.graphs) <= 1 + MOST and not counters["graph_break"]
    pipe.reset_attn_processor()
    assert torch.equal(image(pipe, steps=6), stock) and not torch.equal(expected, stock)
    assert not counters["graph_break"]


def test_a_call_of_half_a_batch_compiles():
    """Catches a call without a guidance branch that breaks the graph, one of its own in every run, or a full batch."""
    pipe = sd_pipeline()
    pipe.unet = one_level()
    pipe.scheduler.set_timesteps(6)
    times = tuple(map(float, pipe.scheduler.timesteps))
    weights = {"output": {3: ((1.2, -0.3), (0.9, 0.2)), 4: ((0.0, 0.7, 0.4), (1.0,))}}
    skips = {"output": frozenset({3}), BRANCH: frozenset({4})}
    schedule = Schedule(times, skips, cost=0.5, weights=weights, shares=(-6.5, 7.5))
    file = ScheduleFile("UNet2DConditionModel", tuple(probe_of(pipe.unet).tolist()), "DDIMScheduler", (schedule,))
    processor = PARProcessor(schedule=file, inner=None)
    pipe.set_attn_processor(processor)
    expected = image(pipe, steps=6)
    pipe.reset_attn_processor()
    backend = Backend()
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    pipe.set_attn_processor(processor)
    assert torch.equal(image(pipe, steps=6), expected) and report(pipe).skipped[BRANCH] == (1, 4)
    seen = len(backend.graphs)
    assert torch.equal(image(pipe, steps=6), expected) and not counters["graph_break"]
    # Of a call of the whole batch, of half of it, and of one that is forecast.
    assert len(backend.graphs) == seen == 3


def test_skipped_blocks_compile():
    """Catches gates that read a schedule inside of a graph, or whose memory is another tensor in every step."""
    model, run = made("pixart-sigma")
    skips = {"transformer_blocks.1": [3, 4, 6], "output": [9]}
    reducer = PARProcessor(budget=0.5, schedule=by_hand(model, skips, tuple(map(float, TIMES))), inner="turbo")
    with attach(model, reducer):
        expected = run()
        told = report(model).skipped
        backend = Backend()
        model.compile(backend=backend, fullgraph=True)
        assert torch.equal(run(), expected) and told == {"transformer_blocks.1": (4, 8), "output": (1, 11)}
        seen = len(backend.graphs)
        assert torch.equal(run(), expected)
        assert len(backend.graphs) == seen <= 2 + MOST and not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_gradients_go_through_compiled_blocks():
    """Catches an operator without gradients where they are wanted, and memory that a graph writes to in a backward."""
    model, _ = made("flux")
    kind, latents = FAMILIES["flux"], random(1, 64, 8).requires_grad_()
    calls = [kind.inputs(1, (8, 8)) | kind.time(time, 1) for time in (900, 800)]
    gradients, backend = [], Backend()
    with attach(model, TurboProcessor(0.4, restore="copy", match_every=0)):
        for compiles in (False, True):
            if compiles:
                model.compile_repeated_blocks(backend=backend, fullgraph=True)
            for call in calls:
                output = model(hidden_states=latents, **call, return_dict=False)[0]
            gradients += torch.autograd.grad(output.square().sum(), latents)
    assert backend.graphs
    torch.testing.assert_close(*gradients)
