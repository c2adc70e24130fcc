"""Videos in a prompt: each frame, or pair of frames, that has tokens of its own is an image like others."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.vlm.call import Calls, Last
from gen_turbo.vlm.family import merge_side, merged_sizes, pooled_grids
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.images import FRAME, Frame, Images
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.stage import Handle, Stage

Frames = dict[int, list[Frame]]
"""The frames of videos by how many tokens these have: beams repeat videos in an order of their own."""


class Videos(Stage):
    """Finds the frames of the videos of a call; stands before the base model's `get_video_features`.

    Args:
        base: The base model.
        frames: Gives the frames of the videos in a call of its `get_video_features`; None in families without videos.
        calls: The calls of the base model.
        is_taken: Whether frames are planned as images are.
        is_whole: Whether the frames of a video are planned together.
    """

    def __init__(
        self,
        base: nn.Module,
        frames: Callable[[nn.Module, dict[str, Any]], Frames] | None,
        calls: Calls[Running],
        is_taken: bool = False,
        is_whole: bool = False,
    ) -> None:
        self._base, self._frames, self._calls = base, frames, calls
        self._is_taken, self._is_whole = is_taken, is_whole
        self._encoding: Calls[None] = Calls(lambda: None)
        # Videos may be encoded before the call that reads them.
        self._last: Last[Frames] = Last(dict)

    @property
    def is_encoding(self) -> bool:
        """Whether a video is being encoded, by some families as images are."""
        return self._encoding.is_running

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Takes the place of `get_video_features`, where there is one."""
        if not hasattr(self._base, "get_video_features"):
            return
        signature = inspect.signature(self._base.get_video_features)  # type: ignore[arg-type]

        def encoded(get_video_features: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._encoding.begin()
            try:
                output = get_video_features(*args, **kwargs)
            finally:
                self._encoding.end()
            if self._frames is not None and self._is_taken:
                self._last.value = self._frames(self._base, signature.bind_partial(*args, **kwargs).arguments)
                self._bring(len(one) for one in getattr(output, "pooler_output", ()))
            return output

        # A compiled model runs the tower in eager code, as with images.
        eager = torch.compiler.disable(encoded)  # type: ignore[no-untyped-call]
        yield InstanceMethod(self._base, "get_video_features", eager)

    def are_in(self, given: dict[str, Any]) -> bool:
        """Whether a call of the base model brings videos whose frames are planned; warns if they are read in full."""
        encoded = (given.get("mm_encoder_outputs") or {}).get("video")
        lengths = [] if encoded is None else [len(one) for one in encoded.pooler_output]
        if encoded is None and given.get("pixel_values_videos") is None:
            return False
        if self._is_taken and self._frames is not None and all(length in self._last.value for length in lengths):
            self._bring(lengths)
            return True
        words = (
            "video tokens are not reduced here, the video is read in full; use place='pre_llm' or place='decoder' and "
            "a method that reads no attention of the tower, such as turbo or divprune, or pass frames as images"
        )
        warnings.warn(words, NoEffectWarning, stacklevel=3)
        return False

    def _bring(self, lengths: Iterable[int]) -> None:
        """Notes the frames of the videos, by their tokens, that the running call brings."""
        videos = [self._last.value[length] for length in lengths]
        if self._is_whole:
            videos = [together(frames) for frames in videos]
        self._calls.now.frames = [frame for frames in videos for frame in frames]


def together(frames: list[Frame]) -> list[Frame]:
    """Frames of one size that follow each other as one set; the newline behind a video stays apart."""
    runs = [list(run) for _, run in groupby(frames)]
    return [Frame(one.length * len(run), one.grid, len(run)) for run in runs for one in run[:1]]


def packed_frames(base: nn.Module, given: dict[str, Any]) -> Frames:
    """The frames of Qwen's videos: two of the video's make one of tokens, in ERNIE behind the tower."""
    config: Any = base.config
    side = merge_side(base)
    found: Frames = {}
    for length, height, width in given["video_grid_thw"].tolist():
        count, grid = length // getattr(config.vision_config, "temporal_merge_size", 1), (height // side, width // side)
        found[count * grid[0] * grid[1]] = [Frame(grid[0] * grid[1], grid)] * count
    return found


def target_frames(base: nn.Module, given: dict[str, Any]) -> Frames:
    """The frames of MiniCPM's videos, whose features come one by one."""
    grids = merged_sizes(base, given, given["target_sizes_videos"])
    return {grid[0] * grid[1]: [Frame(grid[0] * grid[1], grid)] for grid in grids}


def pooled_frames(base: nn.Module, given: dict[str, Any]) -> Frames:
    """The frames of LLaVA-OneVision's videos, each pooled to half its sides, and the newline behind the last."""
    config: Any = base.config
    side = -(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)
    count = given["pixel_values_videos"].shape[1]
    return {count * side**2 + 1: [*[Frame(side**2, (side, side))] * count, Frame(1, None)]}


def strided_frames(base: nn.Module, given: dict[str, Any]) -> Frames:
    """The frames of LLaVA-NeXT-Video, which it pools by a stride."""
    config: Any = base.config
    side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
    count = given["pixel_values_videos"].shape[1]
    return {count * side**2: [Frame(side**2, (side, side))] * count}


def placed_frames(base: nn.Module, given: dict[str, Any]) -> Frames:
    """The frames of Gemma 4's videos, whose patches' (x, y) come with the call."""
    grids = pooled_grids(base, given["video_position_ids"])
    frames = [Frame(grid[0] * grid[1], grid) for grid in grids if grid is not None]
    found, first = {}, 0
    for count in given["num_frames_per_video"].tolist():
        own = frames[first : first + count]
        found[sum(frame.length for frame in own)], first = own, first + count
    return found


def with_frames(images: Images | None, is_video_BL: Tensor, frames: list[Frame]) -> Images:
    """The images of a call and the frames of its videos, in the order of their columns.

    Args:
        images: The images; None where there are none.
        is_video_BL: Which columns are tokens of videos.
        frames: Every frame, in the order of the flattened mask.

    Raises:
        ValueError: If there are not as many placeholders as tokens of frames.
    """
    lengths, count = [frame.length for frame in frames], int(is_video_BL.sum())
    if count != sum(lengths):
        raise ValueError(
            f"{count} video placeholders for {sum(lengths)} video features; pass every video of the prompt, and only "
            "those"
        )
    counts = [frame.num_frames for frame in frames]
    videos = Images(is_video_BL, lengths, [frame.grid for frame in frames], [FRAME] * len(frames), counts=counts)
    if images is None:
        return videos
    entries = []
    for part in (images, videos):
        columns = part.is_image_BL.flatten().nonzero()[:, 0].tolist()
        starts = [0, *accumulate(part.lengths)]
        entries += [(columns[starts[one]], part, one) for one in range(len(part.lengths))]
    order = sorted(entries, key=lambda entry: entry[0])
    lengths, grids, origins = (
        [getattr(part, name)[one] for _, part, one in order] for name in ("lengths", "grids", "origins")
    )
    counts = [part.counts[one] if part.counts else 1 for _, part, one in order]
    return Images(images.is_image_BL | is_video_BL, lengths, grids, origins, images.seen, counts=counts)
