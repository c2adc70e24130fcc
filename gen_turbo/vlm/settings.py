"""Where in a vision-language model a method works, and how; for methods that have no such settings, the defaults."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.token_map import TokenMap

PLACES = ("input", "tower", "projector", "pre_llm", "decoder")


@dataclass
class Placement:
    """Settings of a method that works on the image tokens of a vision-language model.

    Attributes:
        place: "input" makes the image smaller before the vision tower; "tower" merges inside the tower, between
            self-attention and MLP of every block; "projector" merges what the tower returns, before it is projected;
            "pre_llm" reduces the projected image tokens before the language model; "decoder" drops them from one
            decoder layer on.
        layer: With "decoder", the first decoder layer without the dropped tokens; at least 1.
        combine: At the gate or before the projector, "merge" averages the tokens of a slot, "prune" keeps the slot's
            anchor and drops the others; words that `text_ratio` removes too. In the decoder, where a token must not
            see later ones, image tokens are always selected.
    """

    place: str = "pre_llm"
    layer: int = 2
    combine: str = "merge"

    vlm_settings: ClassVar[tuple[str, ...]] = ("place", "layer", "combine")

    def __post_init__(self) -> None:
        """Checks every setting, its own and those of the method's other bases; raises ValueError."""
        check = getattr(super(), "__post_init__", None)
        if check is not None:
            check()
        if self.place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}; got {self.place!r}")
        if self.combine not in ("merge", "prune"):
            raise ValueError(f"combine must be 'merge' or 'prune'; got {self.combine!r}")
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, the second decoder layer; got {self.layer}")


@dataclass
class Staged(Placement):
    """Settings of a method under which image tokens leave in several stages: before decoder layers, each time fewer."""

    @abstractmethod
    def stages(self, num_layers: int, num_tokens: int) -> dict[int, int]:
        """How many of an image's tokens are left from which decoder layer on.

        Args:
            num_layers: Decoder layers.
            num_tokens: Tokens of the image.

        Returns:
            By first layer, 0 among them, ascending; the layers do not depend on the number of tokens.

        Raises:
            ValueError: If a decoder of so many layers has no such stages.
        """

    def unread(self, place: str, has_grid: bool) -> dict[str, str]:
        """The settings that nothing reads, and where they belong."""
        return {"adaptive": "methods that remove tokens at one place", "layer": "methods that cut at one layer"}


@dataclass
class Grouped(Placement):
    """Settings of a method whose own tokens pass through the vision tower and gather the patches, as in VisToG.

    A ratio of 0 keeps the model as it is, whatever these say.

    Attributes:
        num_tokens: Image tokens that the language model reads; 0 takes them from `weights`, else from the ratio.
        weights: File of learned weights, or `embedded:NAME` for one inside the package; None groups untrained.
        first_block: The block of the tower before which the semantic tokens enter. Raising it costs the tower less
            and lets them read less. `weights` brings its own.
    """

    place: str = "projector"
    num_tokens: int = 0
    weights: str | None = None
    first_block: int = 0

    vlm_settings: ClassVar[tuple[str, ...]] = ("num_tokens", "weights", "first_block")

    def __post_init__(self) -> None:
        """Checks every setting, its own and those of the method's other bases; raises ValueError."""
        super().__post_init__()
        if self.place != "projector" or self.combine != "merge":
            raise ValueError(f"groups are made before the projector alone; got place={self.place!r}, {self.combine!r}")
        for setting in ("num_tokens", "first_block"):
            if getattr(self, setting) < 0:
                raise ValueError(f"{setting} must not be negative; got {getattr(self, setting)}")


_DEFAULT = Placement()
_SHARED = ("ratio", "keep", "adaptive", "text_ratio", "across_frames", "proportional_attention")
"""Those of the settings that every method has which vision-language models read."""


def placement_of(reducer: TokenReducer) -> Placement:
    """Gives a method's placement; a method that knows nothing of vision-language models works at the gate."""
    return reducer if isinstance(reducer, Placement) else _DEFAULT


class Placed(Placement, TokenReducer):
    """Any method at a place of one's choice: `attach(model, Placed(TurboProcessor(0.5), place="decoder", layer=3))`.

    Raises:
        ValueError: If a setting is not one of those that `Placement` knows.
    """

    def __init__(self, reducer: TokenReducer, place: str = "pre_llm", layer: int = 2, combine: str = "merge") -> None:
        for setting in fields(TokenReducer):
            setattr(self, setting.name, getattr(reducer, setting.name))
        self.place, self.layer, self.combine = place, layer, combine
        self.reducer = reducer
        self.semantic = getattr(reducer, "semantic", "none")
        self.__post_init__()

    @property
    def max_ratio(self) -> float:
        """The largest ratio that the method can reach."""
        return self.reducer.max_ratio

    def max_ratio_at(self, site: LayerInfo) -> float:
        """The largest ratio that the method can reach at a site."""
        return self.reducer.max_ratio_at(site)

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans as the method does."""
        return self.reducer.plan(tokens, site, frame)


def inner_of(reducer: TokenReducer) -> TokenReducer:
    """The method itself, without what places it."""
    return reducer.reducer if isinstance(reducer, Placed) else reducer


def elsewhere(reducer: TokenReducer) -> str:
    """What to do where a method does not fit a model: take the place that every model has, or a method that can."""
    method: Any = inner_of(reducer)
    can_move = not method.needs and not isinstance(method, Staged)
    if can_move and isinstance(method, Placement):
        try:
            replace(method, place="pre_llm")
        except ValueError:
            can_move = False
    return "use place='pre_llm'" if can_move else "use the method turbo"


def may_remove(reducer: TokenReducer) -> bool:
    """Whether a method, placed or not, ever removes tokens or words of a vision-language model."""
    return not inner_of(reducer).keeps_all and (reducer.removes or bool(reducer.text_ratio))


def changed_settings(reducer: TokenReducer) -> dict[str, Any]:
    """The settings that are not a method's own defaults, by name."""
    method, found = inner_of(reducer), {}
    for owner, kind in ((method, type(method)), (reducer, Placement)):
        if owner is method and kind is Placement:
            continue
        for setting in fields(kind):
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            value = vars(owner).get(setting.name, default)
            if setting.name not in found and value is not default and value != default:
                found[setting.name] = value
    return found


def check_settings(
    reducer: TokenReducer, model_name: str, has_grid: bool, is_cross: bool = False, has_frames: bool = False
) -> None:
    """Refuses every setting that nothing would read, and says where it belongs.

    Args:
        reducer: The method, placed or not.
        model_name: The model's class.
        has_grid: Whether image tokens have rows and columns where the method works.
        is_cross: Whether text reads the image by cross-attention.
        has_frames: Whether frames of videos are known.

    Raises:
        ValueError: Naming the setting and where it belongs.
    """
    changed, method, placement = changed_settings(reducer), inner_of(reducer), placement_of(reducer)
    unread = dict.fromkeys((one.name for one in fields(TokenReducer) if one.name not in _SHARED), "denoisers")
    if placement.place != "decoder":
        unread["layer"] = "place='decoder'"
    if placement.place in ("tower", "input") or (placement.place == "decoder" and placement.combine != "prune"):
        unread["combine"] = "place='pre_llm' and place='projector'"
    if is_cross or placement.place == "decoder" or isinstance(method, Staged):
        unread["proportional_attention"] = "denoisers, and place='pre_llm' or before where prompts hold image tokens"
    if is_cross or placement.place in ("tower", "input", "projector"):
        unread["adaptive"] = "place='pre_llm' and place='decoder' of models whose prompt holds the image tokens"
    needs = set(method.needs)
    if needs - {"class", "self"} or (needs and not is_cross):
        unread["text_ratio"] = "methods that read tokens alone, such as turbo"
    where = _where_videos_are(method, placement.place, has_frames)
    unread |= {"across_frames": where} if where else {}
    told = getattr(method, "unread", None)
    unread |= told(placement.place, has_grid) if told is not None else {}
    for name, value in changed.items():
        if name in unread:
            raise ValueError(
                f"{name}={value!r} has no effect on this {model_name}: it belongs to {unread[name]}; leave it out"
            )


def _where_videos_are(method: TokenReducer, place: str, has_frames: bool) -> str:
    """Where videos can be planned as a whole; empty if they can here."""
    if not has_frames:
        return "models whose videos are known frame by frame, such as Qwen-VL and LLaVA-OneVision"
    if {"class", "self"} & set(method.needs) or place not in ("pre_llm", "decoder"):
        return "place='pre_llm' or place='decoder' and methods that read no attention of the tower"
    return "" if method.plans_videos else "methods that look at several frames, such as turbo and divprune"
