"""LLaVA-1.5: one answer about one image with stock weights, accelerated.

python examples/llava.py [--tiny] [--image FILE]
"""

import argparse
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import gen_turbo
from gen_turbo import TurboProcessor, scenes

CHECKPOINT = "llava-hf/llava-1.5-7b-hf"


def load(is_tiny: bool) -> tuple[Any, Any]:
    """The published checkpoint on a GPU and its processor, or a small stand-in on the CPU."""
    if is_tiny:
        from tiny_models import reader

        return reader("LlavaForConditionalGeneration")
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float16).to("cuda")
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


def main() -> None:
    """Answers one question and prints how many image tokens the language model ran on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="use a small stand-in instead of the checkpoint")
    parser.add_argument("--image", help="an image file; a rendered scene by default")
    parser.add_argument("--prompt", default="describe the picture", help="the question about it")
    options = parser.parse_args()
    caption = "a large red circle on the left of a gray background"
    image = Image.open(options.image).convert("RGB") if options.image else scenes.render(caption, 0)
    model, processor = load(options.tiny)
    # The embedded stand-in reads plain prompts.
    text = f"<image>{options.prompt}" if options.tiny else f"USER: <image>\n{options.prompt} ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with gen_turbo.attach(model, TurboProcessor(0.66)):
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        print(gen_turbo.report(model))
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
