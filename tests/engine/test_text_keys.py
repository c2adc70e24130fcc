"""Keys and values of text: the same bits, made once per prompt, gone with the run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gen_turbo import IdentityProcessor, TurboProcessor, attach, report
from tests.contracts.combinations import COMBINATIONS
from tests.snapshots import differences, model_state
from tests.tiny_hosts import TEXT_WIDTH, UNETS, picture, run_unet, sd_pipeline, unet_inputs

NUM_STEPS = 4


class Projections(TorchFunctionMode):
    """Counts products with the text of a prompt, and lets them through."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num += func is F.linear and args[0].ndim == 3 and args[0].shape[-1] == TEXT_WIDTH and args[0].shape[1] == 6
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["attention", "block"])
@pytest.mark.parametrize("name", UNETS)
def test_it_is_made_once_and_changes_no_bit(name, scope):
    """Catches a projection in every step, and one that the blocks' merged calls make again."""
    unet, inputs = UNETS[name](), unet_inputs()
    with Projections() as stock_counts:
        stock = run_unet(unet, **inputs)
    with attach(unet, IdentityProcessor(scope=scope)), Projections() as counts:
        assert torch.equal(run_unet(unet, **inputs), stock)
    assert stock_counts.num == NUM_STEPS * counts.num > 0
    with attach(unet, IdentityProcessor(scope=scope, reuse_text=False)), Projections() as counts:
        run_unet(unet, **inputs)
    assert counts.num == stock_counts.num


def test_text_or_weights_that_change_are_read_again():
    """Catches a key by name or by prompt: both may be written to within a run."""
    unet, inputs = UNETS["sd15"](), unet_inputs()

    def changed(with_reuse: bool) -> torch.Tensor:
        layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
        text, kept = inputs["encoder_hidden_states"].clone(), layer.weight.detach().clone()
        outputs = []
        with attach(unet, IdentityProcessor(reuse_text=with_reuse)), torch.no_grad():
            for time in (900, 800, 700):
                outputs.append(run_unet(unet, (time,), **inputs | {"encoder_hidden_states": text}))
                text.mul_(1.5) if time == 900 else layer.weight.mul_(1.5)
            layer.weight.copy_(kept)
        return torch.stack(outputs)

    assert torch.equal(changed(True), changed(False))


def test_it_dies_with_the_run_and_keeps_to_the_limit():
    """Catches text of one prompt that is held for the next, and memory that a limit does not know of."""
    pipe = sd_pipeline()
    pipe.set_attn_processor(IdentityProcessor())
    picture(pipe, steps=2)
    told = report(pipe)
    assert told.remembered_bytes == 0 < told.most_remembered_bytes
    pipe.set_attn_processor(IdentityProcessor(memory_limit_mb=0.0))
    picture(pipe, steps=2)
    assert report(pipe).most_remembered_bytes == 0


def test_gradients_are_not_cut():
    """Catches a graph that two steps share."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    inputs["encoder_hidden_states"].requires_grad_()
    with attach(unet, IdentityProcessor()):
        for time in (900, 800):
            unet(inputs["sample"], torch.tensor(time), inputs["encoder_hidden_states"]).sample.sum().backward()


def test_what_was_placed_over_it_stays():
    """Catches a detach that takes an offloading hook along, which replaces the same method."""
    row = COMBINATIONS["offloading of groups"]
    pipe = row.make()
    before, stock = model_state(pipe.unet), row.draw(pipe)
    attachment = attach(pipe, TurboProcessor(0.4))
    attachment.detach()
    assert [key for key in differences(before, model_state(pipe.unet)) if key != "random"] == []
    attachment = attach(pipe, TurboProcessor(0.4))
    row.add(pipe)
    attachment.detach()
    assert torch.equal(row.draw(pipe), stock)
