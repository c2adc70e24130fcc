"""What reaches into the attention call of a processor without replacing the processor: sizes, short keys, kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gen_turbo.engine.placed import Placed
from gen_turbo.engine.run_map import RunMap, taken
from gen_turbo.kernels import merge
from gen_turbo.models.adapter import LayerSpec, TokenArg
from gen_turbo.tokens.weighted import default_scale, weigh_keys

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def reaches_attention(processor: Any) -> bool:
    """Whether a processor calls PyTorch's attention function, directly or by diffusers' choice of kernels."""
    code = getattr(type(processor).__call__, "__code__", None)
    names = code.co_names if code else ()
    return "scaled_dot_product_attention" in names or "dispatch_attention_fn" in names


class AttentionMode(TorchFunctionMode):
    """While it is entered, attention over at least as many keys as queries is computed as asked for.

    Attributes:
        keys: Merges keys and values by this plan of the image tokens, after their projection and positions.
        sizes: Tokens that each image key stands for, (b, M); None for one each.
        text_sizes: The same for text keys, (b, T).
        keys_before: Whether text keys come before those of the image.
        backend: The kernel of diffusers' dispatch that computes what has no mask; None for PyTorch's own.
        hides: Whether a mask of keys hides any; None for whatever mask the processor makes.
    """

    def __init__(
        self,
        keys: RunMap | None = None,
        sizes: Tensor | None = None,
        text_sizes: Tensor | None = None,
        keys_before: bool = False,
        backend: str | None = None,
        hides: bool | None = None,
    ) -> None:
        super().__init__()
        self.keys, self.sizes, self.text_sizes = keys, sizes, text_sizes
        self.keys_before, self.backend, self.hides = keys_before, backend, hides
        self.num_calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Lets every call through but those of attention."""
        if self.hides is not None and (func is Tensor.repeat or func is Tensor.__and__):
            # Processors make a mask of all pairs of tokens from one of keys; kernels spread that themselves.
            return args[0] if args[0].dtype == torch.bool else func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            # torch.compile cannot follow the method, which calls another one of its base class.
            func = torch.unflatten if func is Tensor.unflatten else func
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = {**dict(zip(_NAMES[: len(args)], args, strict=True)), **(kwargs or {})}
        if self.hides is False:
            given["attn_mask"] = None
        if given["query"].shape[-2] <= given["key"].shape[-2]:
            self.num_calls += 1
            num_channels = given["value"].shape[-1]
            output = _attend(self._weighted(self._short(given)), self.backend)
            return output[..., :num_channels]
        return _attend(given, self.backend)

    def _short(self, given: dict[str, Any]) -> dict[str, Any]:
        if self.keys is None:
            return given
        batch, other = len(given["key"]), given["key"].shape[-2] - self.keys.num_tokens
        wide = self.keys.widened(other, 0, batch) if self.keys_before else self.keys.widened(0, other, batch)
        for name in ("key", "value"):
            batch, heads, length, channels = given[name].shape
            rows = given[name].transpose(1, 2).reshape(batch, length, heads * channels)
            short = merge(rows, wide.order, wide.offsets, wide.share)
            given[name] = short.view(batch, -1, heads, channels).transpose(1, 2)
        mask = given.get("attn_mask")
        if mask is not None:
            arg = TokenArg("attn_mask", axis=mask.ndim - 1, has_batch=True, has_text_before=self.keys_before)
            given["attn_mask"] = taken(mask, self.keys.rows_of(mask, arg, other), mask.ndim - 1)
        return given

    def _weighted(self, given: dict[str, Any]) -> dict[str, Any]:
        if self.sizes is None and self.text_sizes is None:
            return given
        # Mochi attends to one sample at a time; all of them have the same map.
        log_size = self._log_size(given["key"].shape[-2])[: len(given["key"])]
        is_half = given["query"].dtype in (torch.float16, torch.bfloat16)
        if self.backend is None and (log_size.device.type == "cpu" or not is_half):
            return {**given, "attn_mask": _added(given, log_size)}
        scale = given.get("scale") or default_scale(given["query"])
        query, key = weigh_keys(given["query"], given["key"], log_size, scale)
        value = F.pad(given["value"], (0, key.shape[-1] - given["value"].shape[-1]))
        return {**given, "query": query, "key": key, "value": value, "scale": scale}

    def _log_size(self, num_keys: int) -> Tensor:
        """Logarithms of all keys' sizes, ones where a part of the keys is not weighed."""
        one = self.sizes if self.sizes is not None else self.text_sizes
        assert one is not None
        image, text = self.sizes, self.text_sizes
        if image is None:
            image = one.new_ones(len(one), num_keys - one.shape[1])
        if text is None:
            text = one.new_ones(len(one), num_keys - one.shape[1])
        batch = max(len(image), len(text))
        parts = [part.repeat(batch // len(part), 1) for part in (image, text)]
        num_between = num_keys - image.shape[1] - text.shape[1]
        if num_between > 0:
            # References whose keys are cached.
            parts.insert(1, one.new_ones(batch, num_between))
        return torch.cat(parts[::-1] if self.keys_before else parts, 1).float().log()


class InsideAttention(Placed):
    """Stands in front of an attention layer whose attention is to be computed otherwise than its processor says.

    Attributes:
        map: How the keys are merged that a reduced layer runs on; None in a full call. Sizes count by it.
        keys: The same where this attention has to merge its keys itself.
        text_sizes: How many text tokens each text key stands for; None for one each.
        hides: Whether a row hides text keys; None for whatever mask the processor makes.
        is_lazy: Whether it is put in place no sooner than text has been merged.
    """

    is_weighted = is_lazy = False
    backend: str | None = None
    map: RunMap | None = None
    keys: RunMap | None = None
    text_sizes: Tensor | None = None
    hides: bool | None = None

    def __init__(self, spec: LayerSpec, module: nn.Module, is_weighted: bool, backend: str | None) -> None:
        super().__init__(spec.name, module)
        self.is_outermost = False
        self.keys_before, self.has_text_keys = spec.signature.keys_before, spec.signature.has_text_keys
        self.is_weighted, self.backend = is_weighted, backend

    @property
    def reaches(self) -> bool:
        """Whether the layer's processor calls PyTorch's attention function."""
        module: Any = self.module
        return reaches_attention(module.processor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer with its attention computed as asked for."""
        sizes = self.map.size if self.is_weighted and self.map is not None else None
        asked_for = (sizes, self.keys, self.text_sizes, self.backend, self.hides)
        if all(value is None for value in asked_for):
            return self.inner(*args, **kwargs)
        mode = AttentionMode(self.keys, sizes, self.text_sizes, self.keys_before, self.backend, self.hides)
        with mode:
            output = self.inner(*args, **kwargs)
        if mode.num_calls == 0 and (self.keys is not None or sizes is not None):
            raise RuntimeError(
                f"the attention at {self.name} did not call PyTorch's attention; set kv_only and "
                "proportional_attention to False, or the kernel by attention_backend alone"
            )
        return output


def _added(given: dict[str, Any], log_size_BN: Tensor) -> Tensor:
    """The call's mask with the keys' sizes added, for kernels that take one.

    PyTorch's for CPUs takes a mask at 4 % where channels cost 25; those of GPUs that take none are of half types.
    """
    batch, dtype = len(given["key"]), given["query"].dtype
    bias = log_size_BN.to(dtype).repeat(batch // len(log_size_BN), 1)[:, None, None]
    mask: Tensor | None = given.get("attn_mask")
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return mask + bias


def _attend(given: dict[str, Any], backend: str | None) -> Tensor:
    # Few kernels but PyTorch's own take masks, and some drop them without a word.
    if backend is None or given.get("attn_mask") is not None:
        output: Tensor = F.scaled_dot_product_attention(**given)
        return output
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    by_token = {name: given[name].transpose(1, 2) for name in ("query", "key", "value")}
    rest = {name: value for name, value in given.items() if name not in by_token}
    output = dispatch_attention_fn(**by_token, **rest, backend=backend)
    return output.transpose(1, 2)
