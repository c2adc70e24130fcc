"""Wan 2.1: one video with stock weights, accelerated.

python examples/wan.py [--tiny]
"""

import argparse

import torch
from diffusers import WanPipeline

import gen_turbo
from gen_turbo import TurboProcessor

CHECKPOINT = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PROMPT = "a large red circle on a gray background"


def load(is_tiny: bool) -> WanPipeline:
    """The published checkpoint on a GPU, or a small stand-in on the CPU."""
    if is_tiny:
        from tiny_models import pipeline

        return pipeline("WanPipeline")
    pipe = WanPipeline.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    return pipe.to("cuda")


def main() -> None:
    """Generates one video and prints which layers ran on fewer tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="use a small stand-in instead of the checkpoint")
    parser.add_argument("--output", default="wan.gif", help="the animation that is written")
    options = parser.parse_args()
    pipe = load(options.tiny)
    pipe.set_attn_processor(TurboProcessor(0.5, scope="block"))
    size = (
        {"height": 128, "width": 128, "num_frames": 9}
        if options.tiny
        else {"height": 480, "width": 832, "num_frames": 81}
    )
    frames = pipe(
        PROMPT,
        **size,
        num_inference_steps=4 if options.tiny else 30,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pil",
    ).frames[0]
    frames[0].save(options.output, save_all=True, append_images=frames[1:], duration=62)
    print(gen_turbo.report(pipe))
    pipe.reset_attn_processor()


if __name__ == "__main__":
    main()
