"""Training data of the embedded vision-language model: scenes, what each patch shows, and turns in one sequence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_turbo.pipelines import tiny_vlm
from gen_turbo.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Drawing,
    Scene,
    all_pairs,
    all_scenes,
    counts,
    draw,
    is_held_out,
    parse,
    questions,
)

SHOWN = (*COLORS, *SHAPES, *SIZES, *BACKGROUNDS, *(f"{color} dot" for color in COLORS))
"""What a patch may show."""
OUTLINE = 4
"""Parts of a patch, along each side, whose coverage is predicted."""
_PAIRS, _DOTS = 0.55, 0.6
_FOREGROUND_DISTANCE = 60.0
_LEAST_COVERAGE, _LEAST_DOT_PX = 0.2, 3.0


class Row(NamedTuple):
    """One image: its caption, the seed of its rendering and the colour of its dot."""

    caption: str
    look: int
    dot: str | None


class Packed(NamedTuple):
    """Sequences of one image and several independent turns each, (B, L) or (B, 1, L, L).

    Attributes:
        ids: <bos>, the image tokens, then question and answer after question and answer, padded on the right.
        positions: As if each turn came right after the image.
        mask: True where a token may look: back in its own turn, and at the image.
        target: The next token where it belongs to an answer, else -100.
        turn: The number of the turn that a token is of, from 1; 0 for the image.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    target: Tensor
    turn: Tensor


def drawn(count: int, seed: int, held_out: bool = False) -> list[Row]:
    """Scenes of one and of two objects, some with a dot; the held-out ones share no combination with the others."""
    rng = random.Random(seed)
    scenes, pairs = ([s.caption for s in pool if is_held_out(s) == held_out] for pool in (all_scenes(), all_pairs()))
    rows = []
    for _ in range(count):
        caption = rng.choice(pairs if rng.random() < _PAIRS else scenes)
        dot = rng.choice(list(COLORS)) if rng.random() < _DOTS else None
        rows.append(Row(caption, rng.randrange(2**31), dot))
    return rows


def images(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Images as uint8 (B, 3, 128, 128), and as uint8 (B, 21, 16, 16) which of `SHOWN` each patch shows."""
    drawings = [draw(*row) for row in rows]
    pixels = np.stack([np.asarray(drawing.image).transpose(2, 0, 1) for drawing in drawings])
    shown = torch.stack([_shown(row, drawing) for row, drawing in zip(rows, drawings, strict=True)])
    return torch.from_numpy(pixels).contiguous(), shown


def _shown(row: Row, drawing: Drawing) -> Tensor:
    scene = parse(row.caption)
    if isinstance(scene, Scene):
        names = [(scene.color, scene.shape, scene.size)]
    else:
        names = [(scene.color, scene.shape), (scene.other_color, scene.other_shape)]
    side = tiny_vlm.PATCH_PX
    shown = torch.zeros(len(SHOWN), *(len(drawing.objects[0]) // side,) * 2, dtype=torch.uint8)
    covered = torch.from_numpy(np.stack(drawing.objects)).float()
    for cover, words in zip(F.avg_pool2d(covered, side), names, strict=True):
        for word in words:
            shown[SHOWN.index(word)] |= cover >= _LEAST_COVERAGE
    shown[SHOWN.index(scene.background)] = F.avg_pool2d(covered.sum(0, keepdim=True), side)[0] < 1 - _LEAST_COVERAGE
    if drawing.dot is not None:
        area = F.avg_pool2d(torch.from_numpy(drawing.dot)[None].float(), side)[0] * side**2
        shown[SHOWN.index(f"{row.dot} dot")] = area >= _LEAST_DOT_PX
    return shown


def outlines(images: Tensor, side: int) -> Tensor:
    """How much of each of the 16 parts of a patch is no background: (B, N, 16) in [0, 1], from (B, 3, H, W) bytes."""
    pixels = images.float()
    border = torch.cat([pixels[..., :4].flatten(2), pixels[..., -4:].flatten(2)], 2).mean(2)
    is_drawn = (pixels - border[..., None, None]).norm(dim=1, keepdim=True) > _FOREGROUND_DISTANCE
    parts = F.avg_pool2d(is_drawn.float(), images.shape[-1] // (side * OUTLINE))
    return F.unfold(parts, OUTLINE, stride=OUTLINE).transpose(1, 2)


def centres(shown: Tensor) -> tuple[Tensor, Tensor]:
    """Where each patch lies in its object, from what patches show, (B, 21, S, S).

    Returns:
        Offset (x, y) from the object's centre and the object's half extent (x, y), as shares of the image's half
        side, (B, N, 4); and which patches show an object, (B, N).
    """
    first, side = len(COLORS), shown.shape[-1]
    covered = shown[:, first : first + len(SHAPES)].bool()
    x = ((torch.arange(side) + 0.5) / side * 2 - 1).expand(side, side)
    found = torch.zeros(len(shown), 4, side, side)
    for part, place in enumerate((x, x.T)):
        low = torch.where(covered, place, 9.0).amin((2, 3), keepdim=True)
        high = torch.where(covered, place, -9.0).amax((2, 3), keepdim=True)
        found[:, part] = torch.where(covered, place - (low + high) / 2, 0.0).sum(1)
        found[:, 2 + part] = torch.where(covered, (high - low) / 2, 0.0).sum(1)
    return found.flatten(2).transpose(1, 2), covered.any(1).flatten(1)


def training_set(folder: Path, count: int, seed: int) -> tuple[list[Row], Tensor, Tensor]:
    """Training scenes with their images and what these show; drawn once and kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path, rows = folder / f"images_{count}_{seed}.safetensors", drawn(count, seed)
    if not path.exists():
        pixels, shown = images(rows)
        save_file({"images": pixels, "shown": shown}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    tensors = load_file(path)
    return rows, tensors["images"], tensors["shown"]


def turns(row: Row, seed: int, most: int | None = None) -> list[tuple[str, str, str]]:
    """(question, answer, kind) of one image: its caption first, then questions, the one for the dot first of all.

    With `most`, for training, at most so many questions, and then how many there are of each shape: one at a time they
    teach too seldom that the answer depends on the image.
    """
    scene = parse(row.caption)
    caption = row.caption if isinstance(scene, Scene) else scene.canonical.caption
    asked = sorted(questions(row.caption, seed, row.dot), key=lambda question: question.kind != "detail")
    numbers = [] if most is None else counts(row.caption)
    return [(tiny_vlm.CAPTION_PROMPT, caption, "caption"), *asked[:most], *numbers]


@cache
def _words() -> dict[str, int]:
    return tiny_vlm.make_tokenizer().get_vocab()


def encoded(text: str) -> list[int]:
    """The numbers of the words of a prompt or an answer, as the tokenizer gives them."""
    return [_words()[word] for word in text.split()]


def pack(batch: Sequence[Sequence[tuple[str, str, str]]], num_image_tokens: int) -> Packed:
    """Puts the turns of each image into one sequence in which no turn sees another."""
    words, prefix = _words(), 1 + num_image_tokens
    sequences = []
    for asked in batch:
        ids = [words["<bos>"]] + [words[tiny_vlm.IMAGE]] * num_image_tokens
        positions, target, turn = list(range(prefix)), [-100] * prefix, [0] * prefix
        for number, (question, answer, _) in enumerate(asked, 1):
            prompt, reply = encoded(question), [*encoded(answer), words["<eos>"]]
            ids += prompt + reply
            positions += range(prefix, prefix + len(prompt) + len(reply))
            target += [-100] * (len(prompt) - 1) + reply + [-100]
            turn += [number] * (len(prompt) + len(reply))
        sequences.append((ids, positions, target, turn))
    longest = max(len(ids) for ids, *_ in sequences)
    ids, positions, target, turn = (
        torch.tensor([one[part] + [pad] * (longest - len(one[part])) for one in sequences])
        for part, pad in enumerate((words["<pad>"], 0, -100, -1))
    )
    is_before = torch.ones(longest, longest, dtype=torch.bool).tril()
    is_same = (turn[:, None, :] == turn[:, :, None]) | (turn == 0)[:, None, :]
    return Packed(ids, positions, (is_before & is_same)[:, None], target, turn)
