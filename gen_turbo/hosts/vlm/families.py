"""The families of transformers vision-language models that can be reduced."""

from gen_turbo.hosts.base import Host
from gen_turbo.hosts.vlm.llava import LLAVA

HOSTS: tuple[Host, ...] = (LLAVA,)
