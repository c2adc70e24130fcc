"""The published package DeepCache, made comparable: switched on for a `with` block, undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def deep_features_cached(pipe: Any, interval: int) -> Iterator[None]:
    """Keeps deep features of a Stable Diffusion pipeline between steps, at the package's fastest branch.

    Args:
        pipe: A pipeline with a UNet; the package reads the step from its scheduler.
        interval: Every how many steps the whole UNet runs.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the target is a model without its pipeline.
    """
    if not hasattr(pipe, "scheduler"):
        raise ValueError(f"the package DeepCache needs a pipeline with a scheduler; got a {type(pipe).__name__}")
    try:
        extension = import_module("DeepCache.extension.deepcache")
    except ImportError as error:
        raise ImportError(
            "this comparison needs the package DeepCache; run: pip install 'gen_turbo[baselines]'"
        ) from error
    helper = extension.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    free = [module for module in pipe.unet.modules() if "forward" not in vars(module)]
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        # The package does not remove the bound methods that it has set as attributes.
        for module in free:
            vars(module).pop("forward", None)
