"""What one prompt keeps: image tokens by score, and decoder layers, row by row.

Shape names: B rows, L columns of the call, C channels, D decoder layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

MODES = ("drop", "mask", "soft")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the language model is about to read it.

    Attributes:
        embeds_BLC: Its embeddings, image tokens in place.
        is_image_BL: Which columns are image tokens.
        real_BL: Which columns are no padding.
    """

    embeds_BLC: Tensor
    is_image_BL: Tensor
    real_BL: Tensor


@dataclass(frozen=True)
class Scores:
    """How much each column and each decoder layer matters to each row; what scores highest is kept.

    Attributes:
        token_BL: Scores of columns; only those of image tokens are read.
        layer_BD: Scores of decoder layers.
    """

    token_BL: Tensor
    layer_BD: Tensor


class Chooser(Protocol):
    """Scores a prompt, once, before the language model runs."""

    def __call__(self, prompt: Prompt) -> Scores:
        """Gives the scores of every row."""
        ...

    def flops(self, batch: int, length: int) -> int:
        """Operations that scoring such a prompt costs."""
        ...


@dataclass(frozen=True)
class Routing:
    """A chooser and how much it may keep.

    Attributes:
        chooser: Scores each prompt.
        ratio: Fraction of the tokens of each image that is dropped, in [0, 1).
        num_layers: Decoder layers that each row runs; the first layer is always one of them.
        first: The first decoder layer without the dropped tokens; 0 drops them before the language model.
        mode: "drop" drops tokens and skips layers. "mask" only hides them and computes everything, as the released
            code does. "soft" takes the scores themselves, in [0, 1], as weights of keys and layers, for training.
    """

    chooser: Chooser
    ratio: float
    num_layers: int
    first: int = 2
    mode: str = "drop"

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: Naming the setting, its value and what it may be.
        """
        if not 0 <= self.ratio < 1:
            raise ValueError(f"the ratio of dropped tokens must be in [0, 1); got {self.ratio}")
        if self.num_layers < 1:
            raise ValueError(f"at least one decoder layer must run; got {self.num_layers}")
        if self.first < 0:
            raise ValueError(f"the first layer without the dropped tokens must not be negative; got {self.first}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")


class Routed(ABC):
    """A method that, on a vision-language model, looks at the whole prompt and chooses tokens and layers."""

    @abstractmethod
    def routing(self, model: nn.Module, text: nn.Module) -> Routing:
        """Makes the routing for one model, whose language model is `text`.

        Raises:
            ValueError: If there is none for this model.
        """


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows of a batch run which decoder layers; the first layer runs for all.

    Attributes:
        runs_BD: On the CPU, so that asking costs the device nothing.
    """

    runs_BD: Tensor
    _rows: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_scores(cls, layer_BD: Tensor, num_layers: int, has_image_B: Tensor) -> Route:
        """Keeps the layers of highest score in each row; ties in layer order. Rows without an image run all layers."""
        score = layer_BD.detach().float().cpu().clone()
        score[:, 0] = torch.inf
        order = score.argsort(dim=1, descending=True, stable=True)[:, :num_layers]
        runs = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, order, True)
        return cls(runs | ~has_image_B.cpu()[:, None])

    @property
    def is_whole(self) -> bool:
        """Whether every row runs every layer."""
        return bool(self.runs_BD.all())

    def count(self, layer: int) -> int:
        """How many rows run a layer."""
        return int(self.runs_BD[:, layer].sum())

    def rows(self, layer: int, device: torch.device) -> Tensor | None:
        """The rows that run a layer, int64; None if all do."""
        if bool(self.runs_BD[:, layer].all()):
            return None
        if (layer, device) not in self._rows:
            self._rows[layer, device] = self.runs_BD[:, layer].nonzero()[:, 0].to(device)
        return self._rows[layer, device]

    def select(self, index: Tensor) -> Route:
        """Takes rows of the batch, as beam search reorders them."""
        return Route(self.runs_BD[index.cpu()])

    def held(self, layer: int, index: Tensor) -> Tensor:
        """Places of the rows `index` among those that run a layer, where they do."""
        runs = self.runs_BD[:, layer]
        chosen = index.cpu()
        return (runs.cumsum(0) - 1)[chosen[runs[chosen]]].to(index.device)
