"""Conditions that a mask hides, cut once per prompt; masks of keys instead of masks of all pairs of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stated import TurboProcessor
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gen_turbo import IdentityProcessor, attach, report
from tests import tiny_transformers
from tests.engine.families import Keys, relative
from tests.snapshots import differences, model_state
from tests.tiny_images import hunyuan_image
from tests.tiny_transformers import FAMILIES, random

NUM_VIDEO = 3 * 64
SHOWN, HIDDEN = 4 + 2, 12 + 6 + 4
"""Of words and glyphs, and of their padding and an image of zeros."""


def _inputs(batch: int, rows_differ: bool = False, image: float = 0.0) -> dict[str, object]:
    """Four words and two glyphs before padding of noise; the last row may have one word less."""
    is_word, is_glyph = (torch.arange(16) < 4).repeat(batch, 1).long(), (torch.arange(8) < 2).repeat(batch, 1).long()
    is_word[-1, 3] = int(not rows_differ)
    return {
        "encoder_hidden_states": random(batch, 16, 32),
        "encoder_attention_mask": is_word,
        "encoder_hidden_states_2": random(batch, 8, 16, seed=4),
        "encoder_attention_mask_2": is_glyph,
        "image_embeds": torch.full((batch, 4, 16), image),
    }


def _run(model: torch.nn.Module, inputs: dict[str, object], times: tuple[int, ...] = (900, 700)) -> Tensor:
    latents = random(len(inputs["encoder_hidden_states"]), *FAMILIES["hunyuan-video-1.5"].latents((8, 8)))
    with torch.no_grad():
        calls = [
            model(latents, torch.full((len(latents),), float(time)), **inputs, return_dict=False)[0] for time in times
        ]
    return torch.stack(calls)


class Hides(IdentityProcessor):
    """Keeps every image token, and says that it removes some, so that what goes with that is done alone."""

    removes_any = True


class Masks(TorchFunctionMode):
    """What attention is told to hide."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...] | None] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask")
            self.seen.append(None if mask is None else tuple(mask.shape))
        return func(*args, **(kwargs or {}))


class BooleanBytes(TorchDispatchMode):
    """Bytes of masks that are written."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype == torch.bool and not func.is_view:
            self.num += output.numel()
        return output


@pytest.mark.parametrize("rows_differ", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_hidden_is_cut_without_loss(batch, rows_differ):
    """Catches hidden keys that become visible, words that are cut, and padding that stays."""
    model = tiny_transformers.build("hunyuan-video-1.5")
    inputs = _inputs(batch, rows_differ and batch > 1)
    stock, before = _run(model, inputs), model_state(model)
    with attach(model, Hides(0.4, text_ratio=None)), Keys() as keys:
        short = _run(model, inputs)
        assert report(model).text_tokens == (SHOWN + HIDDEN, SHOWN)
    assert relative(short, stock) < 1e-5
    assert max(key for _, key in keys.seen) == NUM_VIDEO + SHOWN
    assert differences(before, model_state(model)) == []


def test_an_image_that_is_given_stays():
    """Catches an image cut as if it were none."""
    model, inputs = tiny_transformers.build("hunyuan-video-1.5"), _inputs(1, image=1.0)
    stock = _run(model, inputs)
    with attach(model, Hides(0.4, text_ratio=None)):
        assert relative(_run(model, inputs), stock) < 1e-5
        assert report(model).text_tokens == (SHOWN + HIDDEN, SHOWN + 4)


@pytest.mark.parametrize(("batch", "mask"), [(1, None), (2, (2, 1, 1, NUM_VIDEO + SHOWN))])
def test_no_layer_makes_a_mask_of_pairs(batch, mask):
    """Catches a mask of all pairs of tokens, and one of keys where nothing is hidden, which flash kernels refuse."""
    model, inputs = tiny_transformers.build("hunyuan-video-1.5"), _inputs(batch, batch > 1)
    with BooleanBytes() as stock:
        _run(model, inputs, (900,))
    with attach(model, Hides(0.4, text_ratio=None)), Masks() as masks, BooleanBytes() as ours:
        _run(model, inputs, (900,))
    # The refiner of the text has a mask of its own.
    assert masks.seen[-2:] == [mask, mask]
    pairs = batch * (NUM_VIDEO + SHOWN + HIDDEN) ** 2
    assert stock.num > 2 * 2 * pairs and ours.num < pairs / 10


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"ratio": 0.4, "text_ratio": 0.0}])
def test_nothing_is_cut_where_that_was_not_asked_for(settings):
    """Catches other bits at ratio 0, and a setting for text that is not obeyed."""
    model, inputs = tiny_transformers.build("hunyuan-video-1.5"), _inputs(1)
    stock = _run(model, inputs)
    with attach(model, TurboProcessor(restore="copy", **settings)), Keys() as keys:
        output = _run(model, inputs)
        assert report(model).text_tokens == (0, 0)
    num_video = 3 * 39 if settings["ratio"] else NUM_VIDEO
    assert max(key for _, key in keys.seen) == num_video + SHOWN + HIDDEN
    assert torch.equal(output, stock) == (settings["ratio"] == 0)


@pytest.mark.parametrize("settings", [{}, {"scope": "block"}, {"scope": "model"}, {"kv_only": True}])
@pytest.mark.parametrize("rows_differ", [False, True])
def test_it_goes_with_every_scope(settings, rows_differ):
    """Catches masks of the length before merging, and text that is counted as before."""
    model, inputs = tiny_transformers.build("hunyuan-video-1.5"), _inputs(2, rows_differ)
    outputs = []
    for ratio in (0.0, None):
        with attach(model, TurboProcessor(0.4, text_ratio=ratio, warmup_steps=1, **settings)), Keys() as keys:
            outputs.append(_run(model, inputs))
            reduced = report(model)
        assert any(layer.num_reduced for layer in reduced.layers)
    assert relative(*outputs) < 1e-4
    assert keys.seen[-1][1] == 3 * 39 + SHOWN


def test_a_kernel_by_name_computes_attention_that_hides_nothing(monkeypatch):
    """Catches PyTorch's own kernel instead of the one that was asked for, as for a call with a mask."""
    from diffusers.models import attention_dispatch

    model, inputs, seen = tiny_transformers.build("hunyuan-video-1.5"), _inputs(1), []
    original = attention_dispatch.dispatch_attention_fn

    def watch(*args, backend=None, **kwargs):
        seen.append((backend, kwargs.get("attn_mask")))
        return original(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", watch)
    for ratio in (0.0, None):
        seen.clear()
        with attach(model, TurboProcessor(0.4, attention_backend="native", text_ratio=ratio)):
            seen.clear()
            _run(model, inputs, (900,))
        assert (("native", None) in seen) == (ratio is None)


def test_the_other_model_of_two_texts():
    """Catches glyphs of HunyuanImage that are cut with the padding around them."""
    torch.manual_seed(0)
    model = hunyuan_image(text_embed_2_dim=16).eval()
    inputs = {name: value for name, value in _inputs(2, True).items() if name != "image_embeds"}
    latents = random(2, 4, 16, 16)

    def call() -> Tensor:
        with torch.no_grad():
            return model(latents, torch.full((2,), 900.0), **inputs, return_dict=False)[0]

    stock = call()
    with attach(model, Hides(0.4, text_ratio=None)):
        assert relative(call(), stock) < 1e-5
        assert report(model).text_tokens == (24, SHOWN)
