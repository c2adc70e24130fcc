"""Calls of `generate` on a LLaVA-1.5 7B of random weights: as it comes, or compiled around a static cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from gen_turbo.bench.gpu import variants
from gen_turbo.bench.gpu.cases import default_dtype
from gen_turbo.bench.settings import Setting
from gen_turbo.bench.vlm_step import NUM_IMAGE_TOKENS, SIDE_PX, make_model, num_bytes
from gen_turbo.vlm.cache_argument import CACHE, cache_in

_IMAGE, _VOCABULARY, _TEXT_BEFORE, _TEXT_AFTER = 3, 64, 35, 20
_LENGTH = _TEXT_BEFORE + NUM_IMAGE_TOKENS + _TEXT_AFTER
_TINY = {"width_scale": 0.0625, "layers": 3, "tower_layers": 2}
_WHOLE = {"width_scale": 1.0, "layers": 32, "tower_layers": 24}
_COMPILER_MODE = "reduce-overhead"
"""Inductor's code in CUDA graphs: what `generate` itself compiles decoding in, where the cache is static."""


def made(seed: int) -> Any:
    """The model on the GPU in bfloat16; without one a tiny one in float32."""
    has_gpu = torch.cuda.is_available()
    sizes: dict[str, Any] = _WHOLE if has_gpu else _TINY
    with default_dtype(dtype()), torch.device("cuda" if has_gpu else "cpu"):
        model = make_model(seed=seed, **sizes)
    return model.to(dtype())


def dtype() -> torch.dtype:
    """What it computes in."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def inputs(model: Any, batch: int) -> dict[str, Tensor]:
    """Prompts as long as LLaVA-1.5's with a short question, each with another image."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_IMAGE + 1, _VOCABULARY, (batch, _LENGTH), generator=generator)
    ids[:, _TEXT_BEFORE : _TEXT_BEFORE + NUM_IMAGE_TOKENS] = _IMAGE
    pixels = torch.randn(batch, 3, SIDE_PX, SIDE_PX, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(like.dtype)}
    return {name: tensor.to(like.device) for name, tensor in given.items()}


class Reader:
    """One call of `generate` under a setting.

    Args:
        model: The model.
        batch: Prompts of a call.
        new_tokens: Tokens that are generated.
        applied: Applies the setting anew, and calls once, before the clock of each call starts, as a user attaches
            once and calls often; None where it is applied already.
        cache: A static cache, emptied before the clock starts; None for a new dynamic one in each call.

    Attributes:
        cache_bytes: Keys and values held behind the last call.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        new_tokens: int,
        applied: Callable[[Any], AbstractContextManager[object]] | None = None,
        cache: StaticCache | None = None,
    ) -> None:
        self._model, self._new_tokens, self._applied, self._cache = model, new_tokens, applied, cache
        self._inputs = inputs(model, batch)
        self.cache_bytes = 0

    def __call__(self, steps: int, before: Callable[[int], object]) -> Tensor:
        """Reads once and gives the tokens; there is one step."""
        given: dict[str, Any] = dict(self._inputs)
        if self._cache is not None:
            self._cache.reset()
            given[CACHE] = self._cache
        with ExitStack() as stack:
            if self._applied is not None:
                stack.enter_context(self._applied(self._model))
                self._generate(given)
            before(0)
            done = self._generate(given)
            before(1)
        self.cache_bytes = num_bytes(cache_in(done))
        sequences: Tensor = done.sequences
        return sequences

    def _generate(self, given: dict[str, Any]) -> Any:
        return self._model.generate(
            **given,
            max_new_tokens=self._new_tokens,
            min_new_tokens=self._new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )


@contextmanager
def compiled(model: Any, setting: Setting, batch: int, new_tokens: int) -> Iterator[Reader]:
    """A reader of a twin of the model, compiled, with a static cache, the setting applied inside the `with` block.

    What is compiled is what a user can: the model, and its vision tower, which `generate` calls on its own.
    """
    own: Any = variants.twin(model)
    for module in (own, own.model.vision_tower):
        module.compile(backend=variants.COMPILER, mode=_COMPILER_MODE, dynamic=False)
    text, weight = own.config.get_text_config(), next(own.parameters())
    cache = StaticCache(text, max_cache_len=_LENGTH + new_tokens)
    # A cache that is made while a graph runs has no address that the graph could know.
    cache.early_initialization(batch, text.num_key_value_heads, text.head_dim, weight.dtype, weight.device)
    with setting.applied(own):
        yield Reader(own, batch, new_tokens, cache=cache)
