"""VisToG's learned parts: semantic tokens and the layer that groups patches around them.

Shape names: B images, N patches, M groups, D channels of the vision tower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gen_turbo.tokens.select import pool_cells
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.training.files import Notes, Size, from_note, read_artefact, save_artefact

FORMAT = "gen_turbo.vistog.1"
_PROBE, _CONNECTOR = "probe", "connector."
# A patch next to a cell joins it by chance about once in twenty times under the noise of training.
_START_LOCALITY = 3.0


@dataclass(frozen=True)
class VisToGShape:
    """What fixes the sizes of the learned parts, and where they enter the tower.

    Attributes:
        num_groups: Semantic tokens, M.
        width: Channels of the vision tower, D.
        first_block: The block before which the semantic tokens enter; 0 is right after the patch embedding.
    """

    num_groups: int
    width: int
    first_block: int = 0


class SemanticGrouping(nn.Module):
    """Semantic tokens and the grouping layer of VisToG (arXiv 2411.17773).

    Every patch goes to the one group whose semantic token, as the tower returns it, it resembles most; a group is the
    mean of its patches plus what its semantic token says. Straight-through with Gumbel noise in training (as in
    GroupViT, arXiv 2202.11094), plain argmax in evaluation. A group without patches is its semantic token.

    Attributes:
        noise: Scale of the noise in training.

    Differs from the paper: each semantic token begins as the mean of the patches in one cell of the grid plus its own
    learned vector, and similarity falls with the squared distance of a patch from that cell. All that is learned
    begins at zero, so an untrained layer pools the cells of `pool_cells`.
    """

    def __init__(self, shape: VisToGShape) -> None:
        super().__init__()
        self.shape, self.noise = shape, 1.0
        # The same start whatever was drawn before, and nothing drawn from the user's generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._make(shape.width)

    def _make(self, width: int) -> None:
        self.tokens = nn.Parameter(torch.zeros(self.shape.num_groups, width))
        self.norm_group, self.norm_patch, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.value, self.semantic = (_zero_linear(width) for _ in range(3))
        self.key = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), _zero_linear(width))
        self.log_locality = nn.Parameter(torch.tensor(_START_LOCALITY).log())

    def enter(self, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """The semantic tokens (B, M, D) of images whose patches are about to enter the tower's blocks."""
        return self.cells(grid, patches_BND.device).merge(patches_BND) + self.tokens.to(patches_BND.dtype)

    def cells(self, grid: tuple[int, int], device: torch.device | str) -> TokenMap:
        """The cells of the grid, one for each semantic token: a plan of one row."""
        return _cells(grid, self.shape.num_groups, str(device))

    def forward(self, groups_BMD: Tensor, patches_BND: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Groups the patches of images.

        Args:
            groups_BMD: The semantic tokens as the tower returns them.
            patches_BND: The patches as the projector would read them, in raster order.
            grid: (height, width) in patches.

        Returns:
            The groups (B, M, D) that the projector reads instead, and the group of each patch (B, N).
        """
        share_BMN = self.assign(groups_BMD, patches_BND, grid)
        slot_BN = share_BMN.detach().argmax(1)
        count_BM1 = share_BMN.sum(2, keepdim=True)
        mean_BMD = share_BMN.to(patches_BND.dtype) @ patches_BND / count_BM1.clamp(min=1).to(patches_BND.dtype)
        z_BMD: Tensor = mean_BMD + self.value(mean_BMD) + self.semantic(self.norm_group(groups_BMD))
        z_BMD = z_BMD + self.mlp(self.norm_mlp(z_BMD))
        return torch.where(count_BM1 > 0, z_BMD, groups_BMD), slot_BN

    def assign(self, groups_BMD: Tensor, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """How much of each patch each group takes: one-hot over groups, (B, M, N) float32, with a gradient."""
        query, key = self.query(self.norm_group(groups_BMD)), self.key(self.norm_patch(patches_BND))
        logits = (query @ key.transpose(1, 2)).float() * self.shape.width**-0.5
        distance = _distances(grid, self.shape.num_groups, str(logits.device))
        logits = logits - self.log_locality.float().exp() * distance
        if not self.training:
            return _one_hot(logits)
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        soft = (logits - self.noise * (-uniform.log()).log()).softmax(1)
        one_hot: Tensor = _one_hot(soft) + soft - soft.detach()
        return one_hot


def _zero_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, device="meta").to_empty(device="cpu")
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def _one_hot(score_BMN: Tensor) -> Tensor:
    """One for the highest score of each patch, the first of equals; zero elsewhere."""
    return torch.zeros_like(score_BMN).scatter_(1, score_BMN.argmax(1, keepdim=True), 1.0)


@lru_cache(maxsize=64)
def _cells(grid: tuple[int, int], num_groups: int, device: str) -> TokenMap:
    return pool_cells(grid, num_groups, device)


@lru_cache(maxsize=64)
def _distances(grid: tuple[int, int], num_groups: int, device: str) -> Tensor:
    """Squared distance, in patches, of each patch from each cell: (M, N); zero inside the cell and only there."""
    slot_YX = _cells(grid, num_groups, "cpu").slot_BN.view(grid)
    inside_MYX = slot_YX == torch.arange(num_groups)[:, None, None]
    squares = []
    for axis, inside_MX in ((0, inside_MYX.any(2)), (1, inside_MYX.any(1))):
        place = torch.arange(grid[axis], dtype=torch.float32)
        first = inside_MX.float().argmax(1, keepdim=True)
        last = first + inside_MX.sum(1, keepdim=True) - 1
        squares.append(((first - place).clamp(min=0) + (place - last).clamp(min=0)) ** 2)
    return (squares[0][:, :, None] + squares[1][:, None]).flatten(1).to(device)


@dataclass
class VisToGArtefact:
    """Learned parts with what is needed to trust them.

    Attributes:
        grouping: The semantic tokens and the grouping layer.
        connector: Weights of the trained projector by name; empty where it was left alone.
        probe: The sample of the weights of the model trained for, see `weight_probe`.
        notes: What else is recorded of the training: stage, steps, seed, data.
    """

    grouping: SemanticGrouping
    connector: dict[str, Tensor]
    probe: Tensor
    notes: dict[str, str]

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes a safetensors file, learned weights in `dtype`; it replaces an older one at once or not at all."""
        weights = {**self.grouping.state_dict(), **{_CONNECTOR + name: w for name, w in self.connector.items()}}
        tensors = {name: weight.detach().to("cpu", dtype) for name, weight in weights.items()}
        notes = {**self.notes, "format": FORMAT, "shape": json.dumps(asdict(self.grouping.shape))}
        save_artefact(path, {**tensors, _PROBE: self.probe}, notes)

    @classmethod
    def load(cls, path: str | Path) -> VisToGArtefact:
        """Reads what `save` wrote, in float32 and in evaluation mode.

        Raises:
            ValueError: If there is no such file or it holds something else.
        """
        remedy = "make some with: gen-turbo calibrate vistog"
        notes, tensors = read_artefact(path, FORMAT, "VisToG weights", remedy, _sizes)
        probe = tensors.pop(_PROBE)
        connector = {name.removeprefix(_CONNECTOR): w for name, w in tensors.items() if name.startswith(_CONNECTOR)}
        grouping = SemanticGrouping(_shape(notes))
        grouping.load_state_dict({name: w for name, w in tensors.items() if not name.startswith(_CONNECTOR)})
        rest = {name: text for name, text in notes.items() if name not in ("format", "shape")}
        return cls(grouping.eval(), connector, probe, rest)


def _shape(notes: Notes) -> VisToGShape:
    shape = from_note(VisToGShape, json.loads(notes["shape"]))
    if min(shape.num_groups, shape.width) < 1 or shape.first_block < 0:
        raise ValueError(f"it is of {shape}")
    return shape


def _sizes(notes: Notes, found: Mapping[str, Size]) -> dict[str, Size]:
    """The sizes of the learned parts; none larger is made than the file holds. A projector may have any."""
    shape = _shape(notes)
    first = {"tokens": (shape.num_groups, shape.width), "query.weight": (shape.width, shape.width)}
    for name, size in first.items():
        if found.get(name) != size:
            raise ValueError(f"{name} has the size {found.get(name)}, not {size}")
    made = {name: tuple(value.shape) for name, value in SemanticGrouping(shape).state_dict().items()}
    connector = {name: size for name, size in found.items() if name.startswith(_CONNECTOR)}
    return {**made, **connector, _PROBE: found[_PROBE]}
