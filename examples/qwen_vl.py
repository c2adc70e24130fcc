"""Qwen2.5-VL: one answer about one image with stock weights, accelerated.

python examples/qwen_vl.py [--tiny] [--image FILE]
"""

import argparse
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import gen_turbo
from gen_turbo import TurboProcessor, scenes

CHECKPOINT = "Qwen/Qwen2.5-VL-3B-Instruct"


def load(is_tiny: bool) -> tuple[Any, Any]:
    """The published checkpoint on a GPU and its processor, or a small stand-in on the CPU."""
    if is_tiny:
        from tiny_models import reader

        return reader("Qwen2_5_VLForConditionalGeneration")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).to("cuda")
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
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": options.prompt}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs = processor(images=image, text=text, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with gen_turbo.attach(model, TurboProcessor(0.66)):
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        print(gen_turbo.report(model))
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
