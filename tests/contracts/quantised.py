"""Flux with quantised weights, as diffusers loads them, or with bitsandbytes' layers, which it loads on GPUs alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig, TorchAoConfig
from torch import nn

from tests.tiny_pipelines import flux


def torchao() -> Any:
    """Int8 weights of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig

    pipe = _flux()
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        config = TorchAoConfig(Int8WeightOnlyConfig())
        load = FluxTransformer2DModel.from_pretrained
        return _with(pipe, load(folder, quantization_config=config, torch_dtype=torch.float32))


def gguf() -> Any:
    """Blocks of 32 bytes with a scale, from a GGUF file."""
    import gguf

    pipe, kind = _flux(), gguf.GGMLQuantizationType.Q8_0
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        path = Path(folder) / "flux.gguf"
        writer = gguf.GGUFWriter(path, "flux")
        for name, tensor in pipe.transformer.state_dict().items():
            values = tensor.float().numpy()
            if values.ndim == 2 and values.shape[1] % 32 == 0:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        config = GGUFQuantizationConfig(compute_dtype=torch.float32)
        load = FluxTransformer2DModel.from_single_file
        return _with(pipe, load(str(path), quantization_config=config, config=folder, torch_dtype=torch.float32))


def bitsandbytes() -> Any:
    """Four bits of normal floats in the linear layers of the blocks."""
    from bitsandbytes.nn import Linear4bit

    pipe = _flux()
    for name, layer in list(pipe.transformer.named_modules()):
        if isinstance(layer, nn.Linear) and "transformer_blocks" in name:
            has_bias = layer.bias is not None
            small = Linear4bit(layer.in_features, layer.out_features, has_bias, torch.float32, quant_type="nf4")
            small.load_state_dict(layer.state_dict())
            owner, _, attribute = name.rpartition(".")
            setattr(pipe.transformer.get_submodule(owner), attribute, small.to("cpu"))
    return pipe


def _flux() -> Any:
    pipe, pipe.call = flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _with(pipe: Any, model: nn.Module) -> Any:
    pipe.register_modules(transformer=model.eval())
    return pipe
