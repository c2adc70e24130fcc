"""The families of diffusers denoisers that can be reduced."""

from gen_turbo.hosts.base import Host
from gen_turbo.hosts.diffusion.unet import UNetHost

HOSTS: tuple[Host, ...] = (UNetHost(),)
