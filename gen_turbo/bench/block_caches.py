"""Caches of diffusers on a transformer, made comparable: switched on for a `with` block, undone afterwards.

FirstBlockCache and TaylorSeer's lite mode do not run on Stable Diffusion 3's classes (diffusers 0.42): they count on
text that the last block does not give. The lite mode forecasts the output, so it is what plain skipping is, on a line
with order 1; FirstBlockCache's rule is written anew here. TaylorSeer on attention and MagCache run where somebody sets
the context that the pipeline does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_RATIOS: weakref.WeakKeyDictionary[nn.Module, dict[int, list[float]]] = weakref.WeakKeyDictionary()


@contextmanager
def taylor_seer(model: nn.Module, interval: int, order: int) -> Iterator[None]:
    """TaylorSeer (Liu et al., 2025, arXiv 2503.06923) on all attention, with three full steps first.

    Args:
        model: The transformer.
        interval: Every how many steps it runs.
        order: Of the Taylor series.
    """
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(cache_interval=interval, max_order=order, taylor_factors_dtype=torch.float32)
    with _undone(model):
        apply_taylorseer_cache(model, config)
        yield


@contextmanager
def mag_cache(pipe: Any, model: nn.Module, steps: int, threshold: float) -> Iterator[None]:
    """MagCache (Ma et al., 2025, arXiv 2506.09045), its ratios measured in one run of the pipeline beforehand."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    known = _RATIOS.setdefault(model, {})
    if steps not in known:
        known[steps] = _measured(pipe, model, steps)
    config = MagCacheConfig(num_inference_steps=steps, mag_ratios=known[steps], threshold=threshold)
    with _undone(model):
        apply_mag_cache(model, config)
        yield


@contextmanager
def first_block_cache(model: nn.Module, threshold: float) -> Iterator[None]:
    """FirstBlockCache's rule: where the first block changes its input as it did, the others' change is repeated.

    Args:
        model: A transformer whose blocks take everything by name and give text and image.
        threshold: Largest relative change of what the first block adds, against the last step that ran in full.
    """
    blocks: Any = model.get_submodule("transformer_blocks")
    last = len(blocks) - 1
    known: dict[str, Tensor] = {}
    is_repeated = False

    def first(run: Any, **kwargs: Any) -> Any:
        nonlocal is_repeated
        text, image = run(**kwargs)
        added = image - kwargs["hidden_states"]
        is_repeated = "added" in known and bool(
            (added - known["added"]).abs().mean() < threshold * known["added"].abs().mean()
        )
        if not is_repeated:
            known.update(added=added, image=image)
        return text, image

    def other(run: Any, number: int, **kwargs: Any) -> Any:
        if not is_repeated:
            text, image = run(**kwargs)
            if number == last:
                known["rest"] = image - known["image"]
            return text, image
        text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        return (None, image + known["rest"]) if number == last else (text, image)

    runs = [block.forward for block in blocks]
    try:
        blocks[0].forward = partial(first, runs[0])
        for number, block in enumerate(blocks[1:], 1):
            block.forward = partial(other, runs[number], number)
        yield
    finally:
        for block in blocks:
            del block.forward


def _measured(pipe: Any, model: nn.Module, steps: int) -> list[float]:
    """The mean ratio of the norms of what the blocks add, from one step to the next."""
    blocks: Any = model.get_submodule("transformer_blocks")
    inputs: list[Tensor] = []
    added: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(kwargs["hidden_states"])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        added.append((output[1] - inputs.pop()).norm(dim=-1))

    handles = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[-1].register_forward_hook(after),
    ]
    try:
        pipe("a circle", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    return [1.0, *(float((new / old).mean()) for old, new in zip(added, added[1:], strict=False))]


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Gives every module the attributes back that it had."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    before = {module: dict(vars(module)) for module in model.modules()}
    HookRegistry.check_if_exists_or_initialize(model)
    try:
        with _context(model, CacheContext, _set_cache_context):
            yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _context(model: nn.Module, kind: Any, choose: Any) -> Iterator[None]:
    """Names the context in every call: hooks that are put on later are not yet there."""
    handle = model.register_forward_pre_hook(lambda module, args: choose(module, kind("denoise")))
    try:
        yield
    finally:
        handle.remove()
