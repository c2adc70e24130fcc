"""What the model of costs and the report count of the tiny models, beside torch's counter of FLOPs."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gen_turbo import attach
from gen_turbo.api import adapter_of
from gen_turbo.engine.costs.saved import Cost
from gen_turbo.engine.costs.work import Workload, stock_work
from gen_turbo.engine.runs import Runs
from gen_turbo.engine.state import SequenceShape
from tests.engine.families import NAMES, family
from tests.tiny_family import NUM_TEXT

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
BATCH = 2
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
        sdpa_flop_count(q, k, v)
    )
}
"""The operator of attention on a CPU, which torch has no formula for."""


def counted(run, times: tuple[int, ...]) -> int:
    """FLOPs of a run."""
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with torch.no_grad(), counter:
        run(times=times)
    return counter.get_total_flops()


LOOSE = {
    "controlnet": 0.04,  # its image of conditions in pixels, its convolutions of the coarser levels
    "wan-animate": 0.025,  # frames of the pose and the face
    "z-image": 0.02,  # the last layer runs on text too
    "hunyuan-dit": 0.015,  # what pools the text is no linear layer that is called
    "lumina2": 0.015,  # the last layer runs on text too
    "ernie-image": 0.015,  # the last layer runs on text too
    "flux3": 0.015,  # two times are embedded, and text has blocks of its own whose attention is a few tokens
    "chroma": 0.01,  # what guides the blocks is a short sequence
    "kandinsky": 0.01,  # halves and doubles maps inside of residual blocks
}
"""How far the count of a tiny model may be off, and why; at real size these parts are a smaller share."""


@pytest.mark.parametrize("name", NAMES)
def test_work_is_what_torch_counts(name, monkeypatch):
    """Catches a prefix that runs through the blocks, sound in rows of the video, every expert, text for image.

    And one time for tokens that have one each, a row per token in what pools or reads another condition.
    """
    model, run = family(name)
    opened, seen = Runs.open, []

    def noted(self, call, geometry):
        seen.append(Workload.of(call, geometry))
        return opened(self, call, geometry)

    monkeypatch.setattr(Runs, "open", noted)
    with attach(model, TurboProcessor(0.4, restore="copy")):
        run(times=(900,))
    # A first call may fill a cache.
    real = counted(run, (900, 700)) - counted(run, (900,))
    assert stock_work(model, adapter_of(model), seen[-1]).flops == pytest.approx(real, rel=LOOSE.get(name, 0.005))


@pytest.mark.parametrize(
    ("name", "stack", "tokens"), [("ltx2", "transformer_blocks", 3 * 64), ("hidream", "single", 79)]
)
def test_the_report_counts_what_tokens_go_through(name, stack, tokens):
    """Catches layers of sound and experts that were not asked in the FLOPs that a report says were saved."""
    model, run = family(name)
    block = next(spec.name for spec in adapter_of(model).blocks(model) if spec.name.startswith(stack))
    module, total = model.get_submodule(block), 0
    beside = (BATCH, BATCH * NUM_TEXT, BATCH * 4)

    def note(linear: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        rows = args[0].numel() // linear.in_features
        total += linear.weight.numel() * rows if rows not in beside else 0

    handles = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, nn.Linear)]
    run(times=(900,))
    for handle in handles:
        handle.remove()
    assert Cost.of(module, kv_only=False).linear_weights == pytest.approx(total / (BATCH * tokens), rel=0.005)


def test_the_report_counts_no_queries_of_a_cached_prefix():
    """Catches text of which the keys alone are there, counted as if it asked too."""
    model, run = family("qwen-image-2.1")
    layer = next(spec.name for spec in adapter_of(model).layers(model) if not spec.left_alone)
    module, found = model.get_submodule(layer), []
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with attach(model, TurboProcessor(0.4, restore="copy")) as attachment:
        run(times=(900,))
        (context,) = attachment.parts[0].root.runs.contexts()[-1:]
        shape: SequenceShape = next(state.shape for state in context.states.values() if state.shape)

    def enter(*_: object) -> None:
        counter.__enter__()

    def leave(*_: object) -> None:
        found.append(counter.get_total_flops())
        counter.__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    run(times=(900,))
    assert shape.text > 0
    assert Cost.of(module, kv_only=False).flops(shape, shape.image) == found[-1]
