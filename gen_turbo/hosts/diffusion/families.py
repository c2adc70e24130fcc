"""The families of diffusers denoisers that can be reduced."""

from gen_turbo.hosts.base import Host
from gen_turbo.hosts.diffusion.dit import HunyuanDiTHost, PixArtHost
from gen_turbo.hosts.diffusion.flux import FluxHost
from gen_turbo.hosts.diffusion.joint import CogViewHost, QwenImageHost, SD3Host
from gen_turbo.hosts.diffusion.single_stream import Lumina2Host, ZImageHost
from gen_turbo.hosts.diffusion.unet import UNetHost
from gen_turbo.hosts.diffusion.video import CogVideoXHost, LTXHost, MochiHost, WanHost

HOSTS: tuple[Host, ...] = (
    UNetHost(),
    PixArtHost(),
    HunyuanDiTHost(),
    SD3Host(),
    FluxHost(),
    CogViewHost(),
    QwenImageHost(),
    Lumina2Host(),
    ZImageHost(),
    WanHost(),
    LTXHost(),
    CogVideoXHost(),
    MochiHost(),
)
