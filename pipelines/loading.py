"""Where checkpoints come from and go to, and one sentence about why one cannot be loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch

from gen_turbo.config import ConfigError

_EMBEDDED = "embedded:"
_TRAINED_IN_BFLOAT16 = (
    *("Flux", "Chroma", "Qwen", "Wan", "ZImage", "Lumina2", "CogView4", "CogVideoX", "LTX", "HunyuanVideo", "Mochi"),
    *("LongCat", "Ovis", "Kandinsky5"),
)
_NETWORK = ("httpx", "httpx2", "requests.exceptions", "socket", "ssl")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def device_of(name: str) -> torch.device:
    """The device of a configuration; raises ConfigError if the machine lacks it."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    count = {"cpu": 1, "mps": int(has_mps), "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= count:
        raise ConfigError(f"there is no device {name} on this machine; take device=cpu or device=auto")
    return device


def dtype_of(name: str, device: torch.device, pipeline: str = "") -> torch.dtype:
    """The dtype of a configuration on a device.

    Args:
        name: As in a configuration.
        device: Where the model goes.
        pipeline: The class of its pipeline; float16 overflows in some, which were trained in bfloat16.
    """
    if name == "auto":
        half = torch.bfloat16 if pipeline.startswith(_TRAINED_IN_BFLOAT16) else torch.float16
        return half if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def find_checkpoint(name: str, index: str) -> str:
    """The folder or the hub name that a library's `from_pretrained` is given.

    Args:
        name: As in a configuration.
        index: The file that every folder of this kind of checkpoint holds.

    Raises:
        ConfigError: If it is neither a folder of this kind nor a name that the hub could know.
    """
    if name.startswith(_EMBEDDED):
        return _embedded(name.removeprefix(_EMBEDDED), index)
    folder = Path(name).expanduser()
    if (folder / index).is_file():
        return str(folder)
    if folder.exists():
        library = "diffusers" if index == "model_index.json" else "transformers"
        raise ConfigError(f"{name} is no {library} checkpoint: it holds no {index}")
    if _HUB_NAME.fullmatch(name):
        return name
    raise ConfigError(f"there is no checkpoint folder {name}; give a folder with a {index} or a hub name owner/name")


def reason(error: Exception, is_local: bool) -> str:
    """One sentence about why loading failed; hub failures come with whole pages of text."""
    causes = list(_causes(error))
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    status = next(filter(None, statuses), None)
    if status is not None:
        return f"the hub answered {status}; check the name, or log in if access to it is restricted"
    is_absent = any(type(cause).__name__ == "LocalEntryNotFoundError" for cause in causes)
    is_cut_off = any(isinstance(cause, ConnectionError) or type(cause).__module__ in _NETWORK for cause in causes)
    if is_cut_off or (is_absent and not is_local):
        return "it is not in the local cache and the hub cannot be reached; give a local folder as checkpoint"
    if is_absent:
        return "it is not in the local cache; set local_files_only=false to fetch it, or give a local folder"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _embedded(name: str, index: str) -> str:
    folder = Path(str(resources.files("gen_turbo.pipelines"))) / "weights"
    known = sorted(path.parent.name for path in folder.glob(f"*/{index}"))
    if name not in known:
        raise ConfigError(f"there is no embedded model {name!r}; inside this package: {', '.join(known) or 'none'}")
    return str(folder / name)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
