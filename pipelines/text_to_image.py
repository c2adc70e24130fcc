"""Any text-to-image pipeline that diffusers can load, from inside the package, a folder or the hub."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

from gen_turbo.config import ConfigError, PipelineConfig
from gen_turbo.registry import PIPELINES

from .loading import device_of, dtype_of, find_checkpoint, reason

_INDEX = "model_index.json"


@PIPELINES.register("text-to-image")
def text_to_image(config: PipelineConfig) -> Any:
    """Loads the pipeline of a checkpoint onto a device.

    Only safetensors files are read and no code of a checkpoint is run.

    Returns:
        A stock diffusers pipeline without a gen_turbo processor.

    Raises:
        ConfigError: If the device or the checkpoint is not there, cannot be read, or makes no images from text.
    """
    device = device_of(config.device)
    checkpoint = find_checkpoint(config.checkpoint, _INDEX)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint,
            dtype=_dtype(config, device, checkpoint),
            variant=config.variant,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=config.local_files_only,
            **_absent(checkpoint),
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # What a stranger's files or a network can do wrong has no common class.
    except Exception as error:
        raise ConfigError(f"cannot load {config.checkpoint}: {reason(error, config.local_files_only)}") from error
    prompt = inspect.signature(type(pipe).__call__).parameters.get("prompt")
    if prompt is None:
        raise ConfigError(f"{config.checkpoint} is a {type(pipe).__name__}, which takes no prompt; choose another")
    return pipe.to(device)


def _dtype(config: PipelineConfig, device: torch.device, checkpoint: str) -> torch.dtype:
    """The dtype of the weights; the pipeline's class, where it matters, is read from the checkpoint's index."""
    if config.dtype != "auto" or device.type != "cuda":
        return dtype_of(config.dtype, device)
    index = Path(checkpoint) / _INDEX
    if not index.is_file():
        index = Path(hf_hub_download(checkpoint, _INDEX, local_files_only=config.local_files_only))
    return dtype_of(config.dtype, device, str(json.loads(index.read_text()).get("_class_name", "")))


def _absent(checkpoint: str) -> dict[str, None]:
    """The parts that a local checkpoint was saved without; diffusers wants them named."""
    index = Path(checkpoint) / _INDEX
    parts = json.loads(index.read_text()) if index.is_file() else {}
    return {name: None for name, source in parts.items() if source == [None, None]}
