"""An image of the image tokens that each method keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from gen_turbo.api import attach
from gen_turbo.bench.asks import Ask, Selecting
from gen_turbo.bench.settings import Method
from gen_turbo.factory import build_processor
from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placed, placement_of

_LABEL_PX = 16
_DARK = 0.2


class _Watched(Placed):
    """A method, where it works, that remembers its last plan."""

    def __init__(self, reducer: TokenReducer, combine: str | None) -> None:
        own = placement_of(reducer)
        super().__init__(reducer, own.place, own.layer, combine or own.combine)
        self.last: TokenMap | None = None

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans as the method does."""
        self.last = super().plan(tokens, site, frame)
        return self.last


def draw_kept(pipe: Any, questions: list[Ask], settings: list[Method], path: Path) -> None:
    """Draws one row for each setting: what the language model is left with to answer each question.

    A method that drops tokens shows dark patches; one that merges paints each patch with the mean of its slot.

    Args:
        pipe: The caption pipeline.
        questions: One column each, about one image each.
        settings: Methods that work before or inside the language model.
        path: The image, by its ending.
    """
    side = questions[0].image.width
    sheet = Image.new("RGB", (side * len(questions), (side + _LABEL_PX) * (1 + len(settings))), "white")
    pen = ImageDraw.Draw(sheet)
    for column, ask in enumerate(questions):
        pen.text((column * side + 2, 2), ask.question, fill="black", font_size=9)
        sheet.paste(ask.image, (column * side, _LABEL_PX))
    for row, setting in enumerate(settings, 1):
        top = row * (side + _LABEL_PX)
        pen.text((2, top + 2), setting.name, fill="black", font_size=11)
        for column, ask in enumerate(questions):
            sheet.paste(_left(pipe, ask, setting), (column * side, top + _LABEL_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@torch.no_grad()
def _left(pipe: Any, ask: Ask, setting: Method) -> Image.Image:
    reducer: Any = build_processor({"method": setting.method, **setting.options})
    watched = _Watched(reducer, "prune" if isinstance(setting, Selecting) else None)
    inputs = pipe.preparer(images=ask.image, text=pipe.text_of(ask.question), return_tensors="pt")
    with attach(pipe.vlm, watched):
        pipe.vlm(**inputs)
    plan = watched.last
    assert plan is not None
    pixels = inputs["pixel_values"]
    patch = pipe.vlm.config.vision_config.patch_size
    patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2)
    is_selecting = watched.combine == "prune" or watched.place == "decoder"
    if is_selecting:
        is_kept = torch.zeros(patches.shape[:2], dtype=torch.bool)
        is_kept[:, plan.anchor_BM[0]] = True
        patches = torch.where(is_kept[..., None], patches, (patches + 1) * _DARK - 1)
    else:
        color = patches.reshape(*patches.shape[:2], 3, -1).mean(-1)
        color = plan.unmerge(plan.merge(color))
        patches = color[..., None].expand(-1, -1, -1, patch**2).flatten(2)
    image = F.fold(patches.transpose(1, 2), pixels.shape[-2:], patch, stride=patch)[0]
    return Image.fromarray(((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
