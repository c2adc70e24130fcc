"""Stock pipelines of transformers: guidance, the end of a run, and the same image again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import report
from gen_turbo.api import NoEffectWarning
from tests.tiny_pipelines import TRANSFORMERS, latents_of


@pytest.fixture(scope="module", params=TRANSFORMERS)
def drawn(request):
    """A pipeline and a function that draws one image."""
    pipe, call = TRANSFORMERS[request.param]()
    pipe.set_progress_bar_config(disable=True)

    return pipe, partial(latents_of, pipe, call)


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_a_run_is_reduced_and_leaves_nothing(drawn, scope):
    """Catches an end of a run that is missed because the model is told other times than the scheduler."""
    pipe, draw = drawn
    stock = draw()
    pipe.set_attn_processor(TurboProcessor(0.4, scope=scope))
    first = draw()
    told = report(pipe)
    again = draw()
    pipe.reset_attn_processor()
    assert torch.equal(first, again) and not torch.equal(first, stock)
    assert told.remembered_bytes == 0 and told.most_remembered_bytes > 0
    assert torch.equal(draw(), stock)


def test_nothing_removed_is_the_same_image(drawn):
    """Catches bookkeeping that disturbs a run."""
    pipe, draw = drawn
    stock = draw()
    pipe.set_attn_processor(TurboProcessor(0.0, attention_backend="native"))
    same = draw()
    pipe.reset_attn_processor()
    assert torch.equal(same, stock)


def test_a_run_without_effect_says_so(drawn):
    """Catches silence where every step was a full one."""
    pipe, draw = drawn
    pipe.set_attn_processor(TurboProcessor(0.4))
    with pytest.warns(NoEffectWarning, match="no token was removed in this run of 2 steps"):
        draw(2)
    pipe.reset_attn_processor()
