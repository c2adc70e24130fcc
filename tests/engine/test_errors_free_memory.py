"""An exception inside of the model ends its run: nothing of it is kept, whoever holds the prompt."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, report
from tests.tiny_hosts import run_unet, sd15_unet, unet_inputs
from tests.tiny_pipelines import latents_of, sd3


@pytest.mark.parametrize("settings", [{}, {"scope": "block", "merge_span": 0}, {"scope": "model"}])
def test_out_of_memory_frees_what_was_remembered(settings):
    """Catches residuals that wait for the caller's own prompt tensors to go, where memory is what ran out."""
    pipe, call = sd3()
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def fail(*args):
        seen.append(args)
        if len(seen) == 4:
            raise torch.OutOfMemoryError

    with attach(pipe, TurboProcessor(0.5, **settings)):
        alone = latents_of(pipe, call)
        handle = pipe.transformer.transformer_blocks[1].ff.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            latents_of(pipe, call)
        assert report(pipe).remembered_bytes == 0 < report(pipe).most_remembered_bytes
        handle.remove()
        assert torch.equal(latents_of(pipe, call), alone)


def test_a_bare_model_too():
    """Catches a run without a scheduler that goes on after an error with what it had."""
    unet, inputs = sd15_unet(), unet_inputs()
    with attach(unet, TurboProcessor(0.5)):
        alone = run_unet(unet, (500, 300, 100), **inputs)
        run_unet(unet, (900, 800, 700), **inputs)
        assert report(unet).remembered_bytes > 0
        with pytest.raises(RuntimeError):
            run_unet(unet, (600,), **inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][..., :-1]})
        assert report(unet).remembered_bytes == 0
        assert torch.equal(run_unet(unet, (500, 300, 100), **inputs), alone)
