"""Any text-to-image pipeline that diffusers can load, from inside the package, a folder or the hub."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from gen_turbo.config import ConfigError, PipelineConfig
from gen_turbo.registry import PIPELINES

from .tiny import weights_folder

_EMBEDDED = "embedded:"
_INDEX = "model_index.json"
_NETWORK = ("httpx", "httpx2", "requests.exceptions", "socket", "ssl")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@PIPELINES.register("text-to-image")
def text_to_image(config: PipelineConfig) -> Any:
    """Loads the pipeline of a checkpoint onto a device.

    Only safetensors files are read and no code of a checkpoint is run.

    Returns:
        A stock diffusers pipeline without a gen_turbo processor.

    Raises:
        ConfigError: If the device or the checkpoint is not there, cannot be read, or makes no pictures from text.
    """
    device = _device(config.device)
    checkpoint = _checkpoint(config.checkpoint)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint,
            dtype=_dtype(config.dtype, device),
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
        raise ConfigError(f"cannot load {config.checkpoint}: {_reason(error, config.local_files_only)}") from error
    prompt = inspect.signature(type(pipe).__call__).parameters.get("prompt")
    if prompt is None:
        raise ConfigError(f"{config.checkpoint} is a {type(pipe).__name__}, which takes no prompt; choose another")
    return pipe.to(device)


def _device(name: str) -> torch.device:
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    count = {"cpu": 1, "mps": int(has_mps), "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= count:
        raise ConfigError(f"there is no device {name} on this machine; take device=cpu or device=auto")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _checkpoint(name: str) -> str:
    """The folder or the hub name that diffusers is given."""
    if name.startswith(_EMBEDDED):
        return _embedded(name.removeprefix(_EMBEDDED))
    folder = Path(name).expanduser()
    if (folder / _INDEX).is_file():
        return str(folder)
    if folder.exists():
        raise ConfigError(f"{name} is no diffusers checkpoint: it holds no {_INDEX}")
    if _HUB_NAME.fullmatch(name):
        return name
    raise ConfigError(f"there is no checkpoint folder {name}; give a folder with a {_INDEX} or a hub name owner/name")


def _embedded(name: str) -> str:
    folder = weights_folder().parent / name
    known = sorted(path.parent.name for path in weights_folder().parent.glob(f"*/{_INDEX}"))
    if name not in known:
        raise ConfigError(f"there is no embedded model {name!r}; inside this package: {', '.join(known) or 'none'}")
    return str(folder)


def _absent(checkpoint: str) -> dict[str, None]:
    """The parts that a local checkpoint was saved without; diffusers wants them named."""
    index = Path(checkpoint) / _INDEX
    parts = json.loads(index.read_text()) if index.is_file() else {}
    return {name: None for name, source in parts.items() if source == [None, None]}


def _reason(error: Exception, is_local: bool) -> str:
    """One sentence about why loading failed; hub failures come with whole pages of text."""
    causes = list(_causes(error))
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    status = next(filter(None, statuses), None)
    if status is not None:
        return f"the hub answered {status}; check the name, or log in if access to it is restricted"
    if any(isinstance(cause, ConnectionError) or type(cause).__module__ in _NETWORK for cause in causes):
        return "it is not in the local cache and the hub cannot be reached; give a local folder as checkpoint"
    if is_local and any(type(cause).__name__ == "LocalEntryNotFoundError" for cause in causes):
        return "it is not in the local cache; set local_files_only=false to fetch it, or give a local folder"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
