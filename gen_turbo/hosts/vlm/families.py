"""The families of transformers vision-language models that can be reduced."""

from gen_turbo.hosts.base import Host
from gen_turbo.hosts.vlm.blip import BLIP
from gen_turbo.hosts.vlm.idefics import IDEFICS
from gen_turbo.hosts.vlm.internvl import INTERNVL
from gen_turbo.hosts.vlm.llava import LLAVA, LLAVA_NEXT
from gen_turbo.hosts.vlm.paligemma import PALIGEMMA
from gen_turbo.hosts.vlm.qwen import QWEN

HOSTS: tuple[Host, ...] = (LLAVA, LLAVA_NEXT, QWEN, INTERNVL, IDEFICS, PALIGEMMA, BLIP)
