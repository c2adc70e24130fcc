"""The families of transformers vision-language models that can be reduced."""

from gen_turbo.engine.base import Host
from gen_turbo.vlm.blip import BLIP
from gen_turbo.vlm.idefics import IDEFICS
from gen_turbo.vlm.internvl import INTERNVL
from gen_turbo.vlm.llava import LLAVA, LLAVA_NEXT
from gen_turbo.vlm.paligemma import PALIGEMMA
from gen_turbo.vlm.qwen import QWEN

HOSTS: tuple[Host, ...] = (LLAVA, LLAVA_NEXT, QWEN, INTERNVL, IDEFICS, PALIGEMMA, BLIP)
