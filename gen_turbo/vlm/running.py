"""What is known of one call of the base model while it runs.

Shape names: B rows, L columns of the call, M of them that reach the first decoder layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.images import Frame, Images, Seen
from gen_turbo.vlm.routes import Route, Scores


@dataclass
class Running:
    """One call.

    Attributes:
        given: The arguments of the base model, by name, where images or videos come.
        has_images: Whether it brings images.
        has_videos: Whether it brings videos whose frames are planned.
        features: Features of each image that the call brings.
        seen: What is known of those images, and of others made with them.
        frames: The frames of the videos that the call brings, where they are planned.
        images: The image tokens among the columns that run now; None where there are none.
        held: Columns that the first layer's cache held when the call began.
        length: M.
        real_BM: The mask by which padding is known among the columns held and those that reach the first layer; None
            if there is none.
        here: Which of the L columns reach the first layer; None if all do.
        total: Which of the tokens seen so far the first layer holds once the call has run; None if all.
        left: Which of the M columns run in the decoder layers that run now; None if all do.
        cuts: By first layer, which of the first layer's columns, those held before too, decoder layers hold.
        attention: Gives the attention (B, M) that the last token of each row pays in the layer before the next cut.
        shorter: Positions of the columns that run now, made once for all layers.
        scores: Scores of the prompt and its images, where a router chooses.
        keep_BL: Which of the L columns a router kept; None if all.
        route: Which rows run which decoder layers; None where all run all.
        is_prompt: Whether the route was chosen in this call.
        is_reading: Whether the language model runs.
        is_bare: Whether the language model was called without the base model.
    """

    given: dict[str, Any] = field(default_factory=dict)
    has_images: bool = False
    has_videos: bool = False
    features: list[Tensor] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    frames: list[Frame] = field(default_factory=list)
    images: Images | None = None
    held: int = 0
    length: int = 0
    real_BM: Tensor | None = None
    here: Columns | None = None
    total: Columns | None = None
    left: Columns | None = None
    cuts: dict[int, Columns] = field(default_factory=dict)
    attention: Callable[[], Tensor] | None = None
    shorter: dict[str, Any] = field(default_factory=dict)
    scores: tuple[Scores, Images] | None = None
    keep_BL: Tensor | None = None
    route: Route | None = None
    is_prompt: bool = False
    is_reading: bool = False
    is_bare: bool = False
