"""Stable Diffusion 1.5: one image with stock weights, accelerated.

python examples/sd15.py [--tiny]
"""

import argparse

import torch
from diffusers import StableDiffusionPipeline

import gen_turbo
from gen_turbo import TurboProcessor

CHECKPOINT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPT = "a large red circle on a gray background"


def load(is_tiny: bool) -> StableDiffusionPipeline:
    """The published checkpoint on a GPU, or a small stand-in on the CPU."""
    if is_tiny:
        from tiny_models import pipeline

        return pipeline("StableDiffusionPipeline")
    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, dtype=torch.float16, variant="fp16")
    return pipe.to("cuda")


def main() -> None:
    """Generates one image and prints which layers ran on fewer tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="use a small stand-in instead of the checkpoint")
    parser.add_argument("--output", default="sd15.png", help="the image that is written")
    options = parser.parse_args()
    pipe = load(options.tiny)
    pipe.set_attn_processor(TurboProcessor(0.4))
    image = pipe(
        PROMPT,
        num_inference_steps=4 if options.tiny else 25,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(options.output)
    print(gen_turbo.report(pipe))
    pipe.reset_attn_processor()


if __name__ == "__main__":
    main()
