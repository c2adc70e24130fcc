"""Stable Diffusion XL: one image with stock weights, accelerated.

python examples/sdxl.py [--tiny]
"""

import argparse

import torch
from diffusers import StableDiffusionXLPipeline

import gen_turbo
from gen_turbo import TurboProcessor

CHECKPOINT = "stabilityai/stable-diffusion-xl-base-1.0"
PROMPT = "a large red circle on a gray background"


def load(is_tiny: bool) -> StableDiffusionXLPipeline:
    """The published checkpoint on a GPU, or a small stand-in on the CPU."""
    if is_tiny:
        from tiny_models import pipeline

        return pipeline("StableDiffusionXLPipeline")
    pipe = StableDiffusionXLPipeline.from_pretrained(CHECKPOINT, dtype=torch.float16, variant="fp16")
    return pipe.to("cuda")


def main() -> None:
    """Generates one image and prints which layers ran on fewer tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="use a small stand-in instead of the checkpoint")
    parser.add_argument("--output", default="sdxl.png", help="the image that is written")
    options = parser.parse_args()
    pipe = load(options.tiny)
    pipe.set_attn_processor(TurboProcessor(0.4))
    image = pipe(
        PROMPT,
        num_inference_steps=4 if options.tiny else 30,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(options.output)
    print(gen_turbo.report(pipe))
    pipe.reset_attn_processor()


if __name__ == "__main__":
    main()
