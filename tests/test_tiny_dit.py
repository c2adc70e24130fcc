"""The embedded transformer: cheap training stands for the real thing, and a stock pipeline draws."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from gen_turbo.pipelines import tiny, tiny_dit

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@torch.no_grad()
def test_one_counted_padding_token_stands_for_all(monkeypatch):
    """Catches a training whose attention is not that of the pipeline, which appends 256 tokens of zeros."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_tiny_dit import CountedAttention

    torch.manual_seed(0)
    model = tiny_dit.make_transformer(pool=2).eval()
    latents, tokens, pooled = torch.randn(2, 4, 32, 32), torch.randn(2, 20, 128), torch.randn(2, 128)
    padded = F.pad(tokens, (0, 0, 0, tiny_dit.NUM_PADDING))
    wanted = model(latents, padded, pooled, torch.tensor([500.0])).sample
    model.set_attn_processor(CountedAttention())
    short = model(latents, padded[:, :21], pooled, torch.tensor([500.0])).sample
    assert torch.allclose(short, wanted, atol=1e-5)
    sys.modules.pop("train_tiny_dit")


@torch.no_grad()
def test_weights_mean_the_same_at_a_finer_resolution():
    """Catches positions that mean another place of the image, and a position table carried over with the weights."""
    torch.manual_seed(0)
    coarse, fine, other = tiny_dit.make_transformer(2).eval(), *(tiny_dit.make_transformer(1).eval() for _ in range(2))
    fine.load_state_dict(tiny_dit.weights(coarse), strict=False)
    smooth = F.interpolate(torch.randn(1, 4, 4, 4), size=(64, 64), mode="bilinear")
    inputs = (torch.randn(1, 20, 128), torch.randn(1, 128), torch.tensor([500.0]))
    wanted = F.avg_pool2d(coarse(F.avg_pool2d(smooth, 2), *inputs).sample, 2).flatten()

    def likeness(model) -> float:
        return F.cosine_similarity(F.avg_pool2d(model(smooth, *inputs).sample, 4).flatten(), wanted, dim=0).item()

    assert likeness(fine) > 0.99
    assert likeness(other) < 0.5


def test_a_stock_pipeline_draws_with_it(tmp_path):
    """Catches a part that StableDiffusion3Pipeline cannot save, load or run, and a pooled text that is cut short."""
    encoders = (tiny_dit.make_text_encoder(), tiny_dit.make_text_encoder())
    pipe = tiny_dit.assemble(tiny.make_autoencoder(), encoders, tiny_dit.make_transformer())
    pipe.save_pretrained(tmp_path)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a large red circle on a gray background", num_inference_steps=1, guidance_scale=1).images[0]
    assert image.size == (128, 128)
    pooled = [
        pipe.encode_prompt(f"a large red circle on the {place} of a gray background", "", "", device="cpu")[2]
        for place in ("left", "right")
    ]
    assert not torch.equal(*pooled)
