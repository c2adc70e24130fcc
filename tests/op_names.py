"""The kernels that run, by name."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OpNames(TorchDispatchMode):
    """Writes down the kernels that run."""

    def __init__(self) -> None:
        """Begins an empty list."""
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes its name."""
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
