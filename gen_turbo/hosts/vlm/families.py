"""The families of transformers vision-language models that can be reduced."""

from gen_turbo.hosts.base import Host

HOSTS: tuple[Host, ...] = ()
