"""Everything that people combine with a processor, as COMBINATIONS.md says."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, detach, reattach, report
from tests.contracts import quantised
from tests.contracts.combinations import COMBINATIONS, draw_image
from tests.contracts.outcomes import COLUMNS, cell, is_absent, read
from tests.tiny_hosts import sd_pipeline
from tests.tiny_transformers import run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_cell_of_the_table_is_so(name, column):
    """Catches whatever breaks, changes nothing or leaves something when two accelerations meet; and a stale table."""
    if is_absent(name):
        pytest.skip(f"{COMBINATIONS[name].needs} is not installed")
    assert read()[name, column] == cell(name, column)


def test_the_table_has_no_empty_cell():
    """Catches a use that nobody checked."""
    cells = read()
    assert set(cells) == {(name, column) for name in COMBINATIONS for column in COLUMNS}
    assert all(value.strip() for value in cells.values())


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes", "gguf"])
def test_quantised_weights_count_as_what_they_stand_for(package):
    """Catches operations counted by the numbers that weights are stored as, half as many or with scales."""
    pytest.importorskip(package)
    saved = []
    for make in (COMBINATIONS["Flux, padded text"].make, getattr(quantised, package)):
        model = make().transformer
        with attach(model, TurboProcessor(0.4, restore="copy")):
            run("flux", model, times=(900,))
            saved.append([(layer.flops, layer.stock_flops) for layer in report(model).layers])
    assert saved[0] == saved[1]


def test_threads_draw_what_they_draw_alone():
    """Catches steps and plans of one thread's run that serve another's."""
    row = COMBINATIONS["two threads, one UNet"]
    pipes = row.make()
    with attach(row.target(pipes), TurboProcessor(0.4, warmup_steps=1)):
        alone = torch.cat([draw_image(pipe, seed) for seed, pipe in enumerate(pipes)])
        assert torch.equal(row.draw(pipes), alone)


def test_fusing_and_unfusing_while_attached():
    """Catches a processor that diffusers had kept, and puts back after the end of an attachment."""
    pipe = sd_pipeline()
    stock, owned = draw_image(pipe), dict(pipe.unet.attn_processors)
    with attach(pipe, TurboProcessor(0.4)):
        reduced = draw_image(pipe)
        pipe.fuse_qkv_projections(vae=False)
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.equal(draw_image(pipe), stock)
    with attach(pipe, TurboProcessor(0.4)):
        assert torch.equal(draw_image(pipe), reduced)
    assert {name: id(processor) for name, processor in pipe.unet.attn_processors.items()} == {
        name: id(processor) for name, processor in owned.items()
    }


def test_reattach_needs_something_attached():
    """Catches a call that attaches nothing in silence."""
    pipe = sd_pipeline()
    with pytest.raises(ValueError, match="nothing is attached to this StableDiffusionPipeline"):
        reattach(pipe)
    attach(pipe, TurboProcessor(0.4))
    reduced = draw_image(pipe)
    pipe.enable_attention_slicing(1)
    assert torch.allclose(draw_image(pipe), reduced, atol=1e-4)
    reattach(pipe)
    assert torch.allclose(draw_image(pipe), reduced, atol=1e-4)
    detach(pipe)
