"""CUDA graphs of models whose text is merged, on the stand-in for a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, report
from tests import tiny_pipelines, tiny_transformers
from tests.engine.cuda import StandIn, stand_in
from tests.engine.test_graphs import TIMES
from tests.tiny_images import hunyuan_image


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The CPU in the place of a GPU."""
    return stand_in(monkeypatch)


def _text(num_words: int, seed: int, num_tokens: int = 16) -> torch.Tensor:
    """A text of some words and of padding that repeats."""
    words = tiny_transformers.random(1, num_words, 32, seed=seed)
    padding = tiny_transformers.random(1, 1, 32, seed=seed + 9)
    return torch.cat([words, padding.expand(1, num_tokens - num_words, 32)], 1)


def _drawn(pipe: object, call: dict[str, object], text: torch.Tensor) -> torch.Tensor:
    texts = {"prompt_embeds": text.clone(), "negative_prompt_embeds": _text(1, 3, text.shape[1])}
    return tiny_pipelines.latents_of(pipe, call | texts, len(TIMES))


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"text_ratio": 0.4}, [_text(5, seed, 5) for seed in (1, 5, 7, 1)]),
        ({}, [_text(3, seed) for seed in (1, 5, 7, 1)]),
    ],
    ids=["ratio", "what repeats"],
)
def test_runs_with_merged_text_share_graphs(settings, texts, cuda):
    """Catches graphs that are captured anew for every prompt, and those that weigh one prompt as another was merged."""
    pipe, call = tiny_pipelines.sd3()
    pipe.set_progress_bar_config(disable=True)
    reducer = TurboProcessor(0.4, **settings)
    with attach(pipe, reducer, graphs=False):
        expected = [_drawn(pipe, call, text) for text in texts]
    with attach(pipe, reducer, graphs=True) as attachment:
        captured = []
        for text, wanted in zip(texts, expected, strict=True):
            assert torch.equal(_drawn(pipe, call, text), wanted)
            captured.append(cuda.since())
        before, after = attachment.parts[0].text_tokens
        assert before > after
    assert 0 < captured[0][0] + captured[1][0] <= 4 and captured[2:] == [(0, len(TIMES))] * 2


def test_prompts_of_about_one_length_share_graphs(cuda):
    """Catches a graph for every number of words, and tokens that stay for that and change the result."""
    pipe, call = tiny_pipelines.sd3()
    pipe.set_progress_bar_config(disable=True)
    texts = [_text(num_words, num_words) for num_words in (3, 5, 4, 6)]
    with attach(pipe, TurboProcessor(0.4, text_ratio=0.0), graphs=False):
        unmerged = [_drawn(pipe, call, text) for text in texts]
    with attach(pipe, TurboProcessor(0.4), graphs=True) as attachment:
        captured = []
        for text, wanted in zip(texts, unmerged, strict=True):
            torch.testing.assert_close(_drawn(pipe, call, text), wanted, rtol=1e-4, atol=1e-4)
            assert attachment.parts[0].text_tokens == (16, 8)
            captured.append(cuda.since())
    assert captured[2:] == [(0, len(TIMES))] * 2


def test_rows_that_a_mask_counts_are_not_captured(cuda):
    """Catches a stand-in on which masks of one prompt choose the tokens of the next: a GPU refuses such a capture."""
    torch.manual_seed(0)
    model, texts = (
        hunyuan_image(text_embed_2_dim=16).eval(),
        {"encoder_hidden_states": tiny_transformers.random(2, 6, 32)},
    )
    texts |= {"encoder_hidden_states_2": tiny_transformers.random(2, 4, 16), "encoder_attention_mask": torch.ones(2, 6)}
    texts |= {"encoder_attention_mask_2": torch.ones(2, 4)}
    with attach(model, TurboProcessor(0.4, restore="copy"), graphs="auto"), torch.no_grad():
        for time in TIMES:
            model(tiny_transformers.random(2, 4, 16, 16), torch.full((2,), float(time)), **texts)
        assert cuda.num_captured == 0 and "cannot be captured" in report(model).graphs


def test_graphs_of_another_length_of_text_go(cuda):
    """Catches buffers and graphs of every length of prompt, held at once, and a pool that has died with its graphs."""
    pipe, call = tiny_pipelines.sd3()
    pipe.set_progress_bar_config(disable=True)
    with attach(pipe, TurboProcessor(0.4), graphs=True):
        alive = []
        for num_words in (3, 12, 20):
            _drawn(pipe, call, _text(num_words, 1, 48))
            assert cuda.since()[1] >= len(TIMES) // 2 and report(pipe).graphs == "captured"
            gc.collect()
            alive.append(len(cuda.alive))
    assert len(cuda.pools) == 3 and len(set(alive)) == 1
