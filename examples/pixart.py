"""PixArt-Sigma: one image with stock weights, accelerated.

python examples/pixart.py [--tiny]
"""

import argparse

import torch
from diffusers import PixArtSigmaPipeline

import gen_turbo
from gen_turbo import TurboProcessor

CHECKPOINT = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
PROMPT = "a large red circle on a gray background"


def load(is_tiny: bool) -> PixArtSigmaPipeline:
    """The published checkpoint on a GPU, or a small stand-in on the CPU."""
    if is_tiny:
        from tiny_models import pipeline

        return pipeline("PixArtSigmaPipeline")
    pipe = PixArtSigmaPipeline.from_pretrained(CHECKPOINT, dtype=torch.float16)
    return pipe.to("cuda")


def main() -> None:
    """Generates one image and prints which layers ran on fewer tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="use a small stand-in instead of the checkpoint")
    parser.add_argument("--output", default="pixart.png", help="the image that is written")
    options = parser.parse_args()
    pipe = load(options.tiny)
    pipe.set_attn_processor(TurboProcessor(0.5, scope="block"))
    image = pipe(
        PROMPT,
        num_inference_steps=4 if options.tiny else 20,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(options.output)
    print(gen_turbo.report(pipe))
    pipe.reset_attn_processor()


if __name__ == "__main__":
    main()
