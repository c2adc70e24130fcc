"""A pipeline without encoders: latents, a scheduler and a denoiser, called as diffusers' own pipelines call theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_LAST_TIME = 999
_GUIDANCE_SCALE = 5.0
_RATE = 0.05


def times_of(steps: int) -> list[float]:
    """The times of a run, falling, on the scheduler's scale."""
    return [float(_LAST_TIME - step * (_LAST_TIME // steps)) for step in range(steps)]


def _nothing(step: int) -> None:
    """Is called before a step and does nothing."""


class BarePipeline:
    """What `attach` needs of a pipeline, and its denoising loop.

    Every run has a timestep tensor of its own, as `scheduler.set_timesteps` makes it, and the model is given times
    from it on the device. With guidance the model is called on both branches of the same latents at once. The loop
    reads nothing back to the host.

    Args:
        model: What denoises.
        latents: What every run begins with, without a second guidance branch.
        inputs: What else the model is given, for all branches.
        time: A time as the model is given it, for its shape and type.
        time_scale: From the scheduler's times to those that the model is given.
        is_guided: Whether the model is called on two branches.

    Attributes:
        model: What denoises.
        components: The model under the name that diffusers has for its kind.
        scheduler: Has the running run's `timesteps`.
    """

    def __init__(
        self,
        model: nn.Module,
        latents: Tensor,
        inputs: Mapping[str, Any],
        time: Tensor,
        time_scale: float = 1.0,
        is_guided: bool = False,
    ) -> None:
        name = "unet" if hasattr(model, "down_blocks") else "transformer"
        setattr(self, name, model)
        self.model = model
        self.components = {name: model}
        self.scheduler = SimpleNamespace(timesteps=None)
        self._latents = latents
        self._inputs = dict(inputs)
        self._time = time
        self._scale = time_scale
        self._is_guided = is_guided

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of the latents, without the second guidance branch."""
        return tuple(self._latents.shape)

    def around(self, model: nn.Module) -> BarePipeline:
        """The same loop around another model."""
        return BarePipeline(model, self._latents, self._inputs, self._time, self._scale, self._is_guided)

    @torch.no_grad()
    def __call__(self, steps: int, before: Callable[[int], object] = _nothing) -> Tensor:
        """Denoises the same noise every time and gives the latents.

        Args:
            steps: Of the run.
            before: Called with a step's number before the step, and with `steps` after the last.
        """
        latents, shape, dtype = self._latents, self._time.shape, self._time.dtype
        self.scheduler.timesteps = torch.tensor(times_of(steps), device=latents.device)
        for step, time in enumerate(self.scheduler.timesteps):
            before(step)
            sample = torch.cat([latents] * 2) if self._is_guided else latents
            told = (time if self._scale == 1 else time * self._scale).to(dtype).expand(shape)
            predicted = self.model(sample, timestep=told, **self._inputs, return_dict=False)[0]
            if predicted.shape[1] != sample.shape[1] and predicted.ndim == 4:
                predicted = predicted.chunk(2, 1)[0]  # the other half is a variance
            if self._is_guided:
                without, with_text = predicted.chunk(2)
                predicted = without + _GUIDANCE_SCALE * (with_text - without)
            latents = latents - _RATE * predicted.to(latents.dtype)
        before(steps)
        return latents
