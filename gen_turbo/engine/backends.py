"""Attention kernels by the names of diffusers: whether one runs here, and if not, why."""

from __future__ import annotations

from importlib import import_module, metadata
from importlib.util import find_spec

import torch
from torch import nn

_PACKAGES = {
    "flash": ("flash_attn", "flash-attn"),
    "_flash_3": ("flash_attn_interface", "flash-attn-3"),
    "sage": ("sageattention", "sageattention"),
    "_sage": ("sageattention", "sageattention"),
    "xformers": ("xformers.ops", "xformers"),
}
"""What kernels of names with such a beginning are imported from, and the package that it is installed by."""
_HUB = "_hub"
"""Kernels that are downloaded for the PyTorch that is there."""


def check_backend(backend: str, model: nn.Module) -> None:
    """Tries a kernel on the model's device and type.

    Raises:
        ValueError: If there is no kernel of that name, its package is not installed or was built for another PyTorch,
            or it does not run there.
    """
    from diffusers.models import attention_dispatch

    known = [name.value for name in attention_dispatch.AttentionBackendName]
    if backend not in known:
        raise ValueError(f"attention_backend must be one of {', '.join(known)}; got {backend!r}")
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    probe = torch.zeros(1, 16, 1, 64, device=parameter.device, dtype=parameter.dtype)
    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(backend))
        attention_dispatch.dispatch_attention_fn(probe, probe, probe, backend=backend)
    except Exception as error:
        place = f"{parameter.device.type} in {str(parameter.dtype).removeprefix('torch.')}"
        reason = _built_for_another(backend) or (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"attention_backend={backend!r} does not run on {place}: {reason}; try 'native'") from error


def _built_for_another(backend: str) -> str:
    """Says so where a kernel's package is installed, but its libraries do not load beside this PyTorch."""
    names = next((names for beginning, names in _PACKAGES.items() if backend.startswith(beginning)), None)
    if names is None or backend.endswith(_HUB) or find_spec(names[0].partition(".")[0]) is None:
        return ""
    module, package = names
    built_for = "another PyTorch"
    try:
        import_module(module)
        if package != "xformers":
            return ""
        # It loads without its libraries, and keeps why.
        missing = getattr(import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
        if missing is None:
            return ""
        built_for = f"PyTorch {missing.build_info.torch_version}" if hasattr(missing, "build_info") else built_for
    except ModuleNotFoundError as error:
        return f"{package} needs {error.name}, which is not installed"
    except (ImportError, OSError, RuntimeError):
        pass
    try:
        package = f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        pass
    return f"{package} was built for {built_for}, and this is {torch.__version__}; install one built for it"
