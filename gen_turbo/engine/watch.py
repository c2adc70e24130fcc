"""Whether a model is still what a graph was captured of: its weights, processors, adapters and their scales."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn

_OUTER = 2
"""Names of the outer modules have fewer dots: the model, its parts and the blocks in their lists."""


class Watch:
    """What a CUDA graph has baked in of a model, seen again without waiting for the device.

    Attributes:
        modules: Those of the model, which live as long as the graph.
        is_offloaded: Whether weights of its parts come and go.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.modules = list(model.modules())
        self._tensors = [tensor for module in self.modules for tensor in _tensors_of(module)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._adapted = [module for module in self.modules if hasattr(module, "scaling")]
        self._attentions = [module for module in self.modules if hasattr(module, "processor")]
        self._outer = [module for name, module in model.named_modules() if name.count(".") < _OUTER]
        self._state, self._hooks = self._read(), [_hooks(module) for module in self.modules]
        self._attributes = [_Attributes(module) for module in self.modules]
        self.is_offloaded = any(_is_offloaded(module) for module in self.modules[1:])

    def is_same(self, is_first_step: bool) -> bool:
        """Whether nothing has changed.

        In the first step of a run the modules themselves are looked at again, their plain attributes and their hooks;
        in later steps what callbacks change: weights, adapters, processors, and the plain attributes of the outer
        modules, which are those of FreeU.
        """
        if is_first_step:
            modules = list(self._model.modules())
            if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
                return False
            tensors = [tensor for module in modules for tensor in _tensors_of(module)]
            if len(tensors) != len(self._tensors):
                return False
            self._tensors = tensors
            if [_hooks(module) for module in modules] != self._hooks:
                return False
            if not all(held.are_same(module) for held, module in zip(self._attributes, modules, strict=True)):
                return False
        return [tensor.data_ptr() for tensor in self._tensors] == self._addresses and self._read() == self._state

    def _read(self) -> list[object]:
        """Scales of adapters, processors and what hangs on the model, by identity or as plain values."""
        state: list[object] = [tuple(getattr(self._model, "peft_config", None) or ())]
        state += [(_plain(module), _hooks(module)) for module in self._outer]
        for module in self._adapted:
            layer: Any = module
            scaling = layer.scaling
            scales = tuple(sorted(scaling.items())) if isinstance(scaling, dict) else scaling
            flags = bool(getattr(layer, "merged", False)), bool(getattr(layer, "disable_adapters", False))
            state.append((scales, str(getattr(layer, "active_adapters", "")), flags))
        for module in self._attentions:
            processor: Any = module.processor
            scale = getattr(processor, "scale", None)
            state.append((id(processor), tuple(scale) if isinstance(scale, list) else str(type(scale))))
        return state


def _tensors_of(module: nn.Module) -> list[Any]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


class _Attributes:
    """The plain attributes of a module; most often every attribute is the same object, which is seen fast."""

    def __init__(self, module: nn.Module) -> None:
        self._names, self._values = tuple(vars(module)), tuple(vars(module).values())
        self._plain = _plain(module)

    def are_same(self, module: nn.Module) -> bool:
        """Whether numbers, names and switches are as they were."""
        held = vars(module)
        is_untouched = len(held) == len(self._names) and all(map(is_, held.values(), self._values))
        if is_untouched and tuple(held) == self._names:
            return True
        if _plain(module) != self._plain:
            return False
        self._names, self._values = tuple(held), tuple(held.values())
        return True


def _plain(module: nn.Module) -> dict[str, object]:
    """Numbers, names and switches."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}


def _hooks(module: nn.Module) -> tuple[object, ...]:
    """Hooks by the numbers that PyTorch gives them."""
    return *module._forward_pre_hooks, None, *module._forward_hooks


def _is_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or any("offload" in name for name in getattr(registry, "hooks", ()))
