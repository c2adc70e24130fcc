"""The families of transformers vision-language models that can be reduced."""

from gen_turbo.vlm.blip import BLIP
from gen_turbo.vlm.gemma import GEMMA
from gen_turbo.vlm.host import VlmHost
from gen_turbo.vlm.idefics import IDEFICS
from gen_turbo.vlm.internvl import INTERNVL
from gen_turbo.vlm.llava import AYA, LLAVA, LLAVA_TILED, MISTRAL
from gen_turbo.vlm.paligemma import PALIGEMMA
from gen_turbo.vlm.qwen import QWEN

ADAPTERS: tuple[VlmHost, ...] = (LLAVA, LLAVA_TILED, AYA, MISTRAL, GEMMA, QWEN, INTERNVL, IDEFICS, PALIGEMMA, BLIP)
