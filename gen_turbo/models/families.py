"""The families of diffusers denoisers that can be reduced."""

from gen_turbo.engine.base import Host
from gen_turbo.models.dit import HunyuanDiTHost, PixArtHost
from gen_turbo.models.flux import ChromaHost, FluxHost
from gen_turbo.models.joint import AuraFlowHost, CogViewHost, QwenImageHost, SD3Host
from gen_turbo.models.single_stream import Lumina2Host, ZImageHost
from gen_turbo.models.unet import UNetHost
from gen_turbo.models.video import CogVideoXHost, HunyuanVideoHost, LTXHost, MochiHost, WanHost

HOSTS: tuple[Host, ...] = (
    UNetHost(),
    PixArtHost(),
    HunyuanDiTHost(),
    SD3Host(),
    AuraFlowHost(),
    FluxHost(),
    ChromaHost(),
    CogViewHost(),
    QwenImageHost(),
    Lumina2Host(),
    ZImageHost(),
    WanHost(),
    LTXHost(),
    CogVideoXHost(),
    MochiHost(),
    HunyuanVideoHost(),
)
