"""What can score a prompt: a trained router, and two controls that never look at it.

Shape names: B rows, L columns, D decoder layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_turbo.tokens.partition import hash_cells
from gen_turbo.training.router import Router, even_draws
from gen_turbo.vlm.routes import Chooser, Prompt, Scores

_PLACES = 1 << 20
"""More than a prompt has tokens, so that prompts of other lengths draw other numbers."""


class Trained:
    """A router that follows the model from device to device."""

    def __init__(self, router: Router) -> None:
        self.router = router.eval()

    @torch.no_grad()
    def __call__(self, prompt: Prompt) -> Scores:
        """Scores every row."""
        device = prompt.embeds_BLC.device
        if self.router.head.weight.device != device:
            self.router.to(device)
        return self.router.choose(prompt)

    def flops(self, batch: int, length: int) -> int:
        """Operations that scoring such a prompt costs."""
        return self.router.flops(batch, length)


class RandomChooser:
    """The control that keeps random tokens and layers: for a prompt the same however it is batched and padded.

    A draw is a hash of the seed, of how many tokens the prompt has and of the image token's or layer's place among its
    own; the global generator is left alone.
    """

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        self._num_layers, self._seed = num_layers, seed

    def __call__(self, prompt: Prompt) -> Scores:
        """Draws scores for every row on its own."""
        row_B1 = prompt.real_BL.sum(1, keepdim=True) * _PLACES
        layer_D = torch.arange(self._num_layers, device=row_B1.device)
        return Scores(self._draw(row_B1 + prompt.is_image_BL.cumsum(1)), self._draw(row_B1 - 1 - layer_D))

    def _draw(self, place: Tensor) -> Tensor:
        return hash_cells(place, self._seed).double() / 2**32

    def flops(self, batch: int, length: int) -> int:
        """Nothing to speak of."""
        return 0


class UniformChooser:
    """The control that keeps tokens and layers at even distances."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    def __call__(self, prompt: Prompt) -> Scores:
        """Scores places alone; image tokens are counted from the first of each row."""
        place_BL = prompt.is_image_BL.cumsum(1)
        layer_D = torch.arange(self._num_layers, device=place_BL.device)
        return Scores(even_draws(place_BL), even_draws(layer_D).expand(len(place_BL), -1))

    def flops(self, batch: int, length: int) -> int:
        """Nothing to speak of."""
        return 0


CONTROLS = ("random", "uniform")


def control(name: str, num_layers: int, seed: int = 0) -> Chooser:
    """The control of that name, one of `CONTROLS`."""
    return RandomChooser(num_layers, seed) if name == "random" else UniformChooser(num_layers)
