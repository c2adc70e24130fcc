"""All that methods and hosts know of each other: the site, the frame, the reducer and its settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from gen_turbo.schemas import check_finite, check_kinds
from gen_turbo.tokens.token_map import TokenMap

OF_RESIDUALS = ("full_every", "extrapolation_order", "warmup_steps", "stagger", "memory_limit_mb")
"""Settings that copied outputs do not have."""
Grid = tuple[int, int]
"""(height, width) of the visual tokens, in tokens."""


@dataclass(frozen=True)
class LayerInfo:
    """One attention call as a method sees it.

    Attributes:
        name: The layer's path in the model, `down_blocks.0.attentions.0.transformer_blocks.0.attn1`.
        ratio: The fraction of visual tokens to remove here, in [0, 1).
        grid: (height, width) of the visual tokens; None where it is unknown.
        semantic: Gives the semantic value of each token by kind ("self", "text") as (B, N), or None where the
            host has none to give. Called only when a method wants it, for it costs a projection.
        num_frames: Frames of a video that is planned as a whole, one frame of `grid` behind the other; 1 elsewhere.
        num_leading: Class tokens in front of the others, of methods that say `plans_leading`; 0 elsewhere. They stay
            in slots of their own, and `ratio` is of the others.
    """

    name: str
    ratio: float
    grid: Grid | None = None
    semantic: Callable[[str], Tensor | None] | None = None
    num_frames: int = 1
    num_leading: int = 0

    def first_semantic(self, *kinds: str) -> Tensor | None:
        """The semantic value (B, N) of the first of some kinds that there is; None where there is none of them."""
        if self.semantic is None:
            return None
        return next((value for kind in dict.fromkeys(kinds) if (value := self.semantic(kind)) is not None), None)


@dataclass(frozen=True)
class StepInfo:
    """Facts of the running forward, observed once at the model's root.

    Attributes:
        step: Calls of the denoiser since the run began; 0 for the first.
        num_plans: Plans made before in this run at this resolution; varies what alternates, such as tile shift.
    """

    step: int = 0
    num_plans: int = 0


@dataclass
class TokenReducer(ABC):
    """Decides which visual tokens survive, and says where, when and how reduction is applied.

    Settings are checked when the object is made: a ValueError names the setting, its value and what it may be. `attach`
    raises ValueError for a setting that nothing would read on the model.

    Attributes:
        ratio: Fraction of visual tokens removed, in [0, 1). Raising it is faster and further from stock.
        max_downsample: The coarsest layers of a UNet that are reduced, by how many times their grid is smaller than the
            latent's: 1, 2, 4 or 8. None is the finest resolution that has attention (SDXL: 2), or with scope "auto" all
            that gain. Raising it reaches deeper, cheaper layers that matter more to the image.
        ratios: Ratio by downsample factor (1 is the latent's own grid, 2 half of it); overrides `ratio` and
            `max_downsample` for the levels it names.
        layer_ratios: Ratio by layer, named as in `report` or by a pattern such as `up_blocks.*`; overrides `ratios`
            for the layers it names, the last pattern that fits. 0 runs a layer in full.
        step_scale: Factor on every ratio from a step of the run on, 1 before the first step that is named:
            `{0: 0.5, 10: 1}` removes half as many in the first ten steps. With "residual" it takes effect at a
            layer's next full step.
        restore: "residual" adds to the merged layer's output the detail that it missed when the layer last ran in
            full; "copy" gives every token its slot's output, as published; "auto" is "residual", or what scope "auto"
            finds best for the run's length.
        full_every: With "residual", every how many steps a layer runs in full. Raising it is faster. None is 3, or with
            scope "auto" what suits the run's length.
        extrapolation_order: With "residual", 0 holds the remembered detail, 1 continues it linearly in the step.
        warmup_steps: With "residual", how many first steps run in full. Two, which None is, give order 1 its slope at
            once; with scope "auto" None is one.
        stagger: With "residual", spreads the full steps of the layers over the steps, which evens out their times.
        match_every: How many steps a plan serves; 0 means the whole run. With "residual" a new plan waits for the
            layer's next full step. None takes 1 with "copy", for a plan made in the noise of the first step serves
            the later ones badly, and 0 with "residual", which repairs what such a plan misses.
        memory_limit_mb: With "residual", the most that residuals and maps of a run may take, in megabytes; layers
            beyond it run as in the stock model. None sets no limit.
        scope: "attention" shortens the attention layers; "block" whole transformer blocks, with cross-attention and
            feed-forward, restoring each token by adding its merged token's change; "model" a transformer from its first
            block to its last, with one residual for all. Each saves more, further from stock. "auto" lets a model of
            costs choose in the first call of each run: scope, layers, `restore`, `full_every` and `warmup_steps`, as
            far as they are not given, by the shapes, the kind of device and the number of steps; nothing is timed.
        merge_span: With scope "block", how many consecutive blocks of a stack share one short sequence, restored after
            the last of them; 0 is all. Raising it remembers less, restores less often, and is further from stock.
        kv_only: Merges keys and values only; every token stays a query. Closer to stock, saves less.
        proportional_attention: Lets a key that stands for several tokens weigh as much as they did. In vision-language
            models in the attention of the language model, prompt and answer; vision towers that merge always do.
        text_ratio: Fraction of the text tokens removed, once per prompt, where they share attention with the image
            (SD3, Flux and its kin, AuraFlow, Chroma, CogView, HunyuanVideo, CogVideoX with rotary positions) or the
            model keeps their keys (Qwen-Image 2.1); attention counts each by its size. None merges tokens equal to
            their neighbour where they are half of the text, as padding is: no loss beyond rounding, where a fixed
            fraction is free only up to the padding that there is. In vision-language models: fraction of the words
            that leave a prompt with images, none by default.
        reference_ratio: Fraction of the tokens removed of references beside the target (FLUX.1 Kontext, FLUX.2,
            LongCat-Image-Edit, Qwen-Image-Edit), once per run; None takes the layer's own ratio. Qwen-Image 2.1 keeps
            their keys and values, which are merged once, and None takes `ratio`.
        attention_backend: The attention kernel by diffusers' name (`native`, `flash`, `sage`, `xformers`, ...) in
            every attention layer; None keeps the model's own.
        keep: In vision-language models, how many image tokens of an image stay, instead of `ratio`.
        adaptive: In vision-language models, shares the budget among the images of a call: busy ones keep more, plain
            ones fewer, as many in all as `ratio` or `keep` say. An image that comes alone keeps its own.
        across_frames: In vision-language models, plans a video as one image of frames x height x width tokens, of
            which `ratio` is removed or `keep` stay in all: what does not change is read once and what moves keeps
            more. Otherwise every frame is an image of its own, with a budget of its own.
    """

    ratio: float = 0.5
    max_downsample: int | None = None
    ratios: dict[int, float] = field(default_factory=dict)
    layer_ratios: dict[str, float] = field(default_factory=dict)
    step_scale: dict[int, float] = field(default_factory=dict)
    restore: str = "residual"
    full_every: int | None = None
    extrapolation_order: int = 1
    warmup_steps: int | None = None
    stagger: bool = False
    match_every: int | None = None
    memory_limit_mb: float | None = None
    scope: str = "attention"
    merge_span: int = 1
    kv_only: bool = False
    proportional_attention: bool = False
    text_ratio: float | None = None
    reference_ratio: float | None = None
    attention_backend: str | None = None
    keep: int | None = None
    adaptive: bool = False
    across_frames: bool = False

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: Naming the setting, its value and what it may be.
        """
        check_kinds(self)
        check_finite(self)
        self._check_ratios()
        for name in ("text_ratio", "reference_ratio"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a fraction of tokens, 0 <= {name} < 1; got {getattr(self, name)}")
        if self.restore not in ("residual", "copy", "auto"):
            raise ValueError(f"restore must be 'residual', 'copy' or 'auto'; got {self.restore!r}")
        if self.extrapolation_order not in (0, 1):
            raise ValueError(f"extrapolation_order must be 0 (hold) or 1 (linear); got {self.extrapolation_order}")
        least = {"max_downsample": 0, "full_every": 2, "warmup_steps": 1, "match_every": 0, "merge_span": 0}
        for setting, minimum in least.items():
            if getattr(self, setting) is not None and getattr(self, setting) < minimum:
                raise ValueError(f"{setting} must be at least {minimum}; got {getattr(self, setting)}")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep must be a number of tokens, at least 1; got {self.keep}")
        if self.memory_limit_mb is not None and self.memory_limit_mb < 0:
            raise ValueError(f"memory_limit_mb must not be negative; got {self.memory_limit_mb}")
        self._check_together()

    def _check_ratios(self) -> None:
        by_level = {f"ratios[{downsample}]": ratio for downsample, ratio in self.ratios.items()}
        by_layer = {f"layer_ratios[{layer!r}]": ratio for layer, ratio in self.layer_ratios.items()}
        for step, scale in self.step_scale.items():
            if step < 0 or not 0 <= scale < float("inf"):
                raise ValueError(f"step_scale must give factors >= 0 by step >= 0; got {step}: {scale}")
        for name, ratio in {**by_level, **by_layer, "ratio": self.ratio}.items():
            # Vision-language models merge again where one merge does not reach `ratio`; see `check_reach`.
            most = 1.0 if name == "ratio" and not self.step_scale else self.max_ratio
            bound = f"<= {most:g}" if most < 1 else "< 1"
            if not 0 <= ratio <= most or ratio >= 1:
                raise ValueError(f"{name} must be the fraction of tokens to remove, 0 <= {name} {bound}; got {ratio}")
            for step, scale in self.step_scale.items():
                if ratio * scale > self.max_ratio or ratio * scale >= 1:
                    raise ValueError(
                        f"{name} times step_scale[{step}] must be {bound}; got {ratio} * {scale} = {ratio * scale:g}"
                    )

    def check_reach(self) -> None:
        """Refuses what one merge cannot reach, as in a denoiser; raises ValueError."""
        if self.ratio > self.max_ratio:
            raise ValueError(
                f"ratio must be the fraction of tokens to remove, 0 <= ratio <= {self.max_ratio:g}; got {self.ratio}"
            )

    def ratio_of(self, num_tokens: int) -> float:
        """The fraction of so many tokens that is removed, by `keep` where it is given, else `ratio`."""
        # Half a token more, so that rounding down removes exactly the number.
        return self.ratio if self.keep is None else max(0.0, 1 - (self.keep - 0.5) / num_tokens)

    @property
    def removes(self) -> bool:
        """Whether any token may leave."""
        return self.keep is not None or self.ratio > 0

    def changed(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of some settings that are not the method's own defaults."""
        return {name: value for name in names if (value := getattr(self, name)) != getattr(type(self), name)}

    def _check_together(self) -> None:
        for setting, value in self.changed(OF_RESIDUALS if self.restore == "copy" else ()).items():
            raise ValueError(f"{setting}={value!r} has no effect with restore='copy'; leave it out")
        if self.scope not in ("auto", "attention", "block", "model"):
            raise ValueError(f"scope must be 'auto', 'attention', 'block' or 'model'; got {self.scope!r}")
        if self.scope != "block" and self.merge_span != 1:
            raise ValueError(f"merge_span={self.merge_span} is of whole blocks; use scope='block', got {self.scope!r}")
        inside = [name for name in ("kv_only", "proportional_attention") if getattr(self, name)]
        if self.scope not in ("attention", "auto") and inside:
            names = " and ".join(inside)
            raise ValueError(f"{names} can only be set with scope='attention' or 'auto', got {self.scope!r}")

    map_period: ClassVar[int] = 0
    """After how many maps of a run a method chooses alike again; 0 where it may choose otherwise at every step."""
    keeps_all: ClassVar[bool] = False
    """Whether a method removes nothing, whatever the ratio."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What a method reads beside tokens: attention of a tower ("class", "self"), that of a prompt's last token to a
    decoder layer's input ("last") or in it ("next"), or images themselves ("input")."""

    attention_settings: ClassVar[tuple[str, ...]] = ()
    """Settings of what the attention of a layer shows, and whole blocks do not; a subclass names its own."""
    vlm_settings: ClassVar[tuple[str, ...]] = ("keep", "adaptive", "across_frames")
    """Settings that vision-language models alone read; a subclass names its own."""

    plans_videos: ClassVar[bool] = True
    """Whether the tokens of a whole video can be planned at once, and not those of one grid or line alone."""

    plans_leading: ClassVar[bool] = False
    """Whether a plan is of the class tokens of a vision tower too; they are kept apart from others' plans."""

    @property
    def reads_attention(self) -> str:
        """The setting, or method, for which layers must show their attention; empty where none does."""
        if {"class", "self"} & set(self.needs):
            return type(self).__name__
        changed = self.changed(self.attention_settings).items()
        return next((f"{name}={value!r}" for name, value in changed if value != "none"), "")

    @property
    def map_life(self) -> int:
        """How many steps a map serves, the default resolved; 0 is the whole run."""
        if self.match_every is None:
            return 1 if self.restore == "copy" else 0
        return self.match_every

    @property
    def refresh_every(self) -> int:
        """Every how many steps a layer runs in full, the default resolved."""
        return self.full_every or 3

    @property
    def num_warmup(self) -> int:
        """How many first steps run in full, the default resolved."""
        return self.warmup_steps or 2

    @property
    def removes_any(self) -> bool:
        """Whether a ratio, if any is above 0, removes tokens."""
        return not self.keeps_all and any(
            ratio > 0 for ratio in (self.ratio, *self.ratios.values(), *self.layer_ratios.values())
        )

    @property
    def max_ratio(self) -> float:
        """The largest ratio that the method can reach."""
        return 1.0

    def max_ratio_at(self, site: LayerInfo) -> float:
        """The largest ratio that the method can reach at a site; above it, it plans again on what is merged."""
        return self.max_ratio

    @abstractmethod
    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans the reduction of tokens at one site; the same input gives the same plan.

        Args:
            tokens: What the site reads, (B, N, C), floating point.
            site: The layer, the ratio there and the grid.
            frame: The running call of the denoiser.

        Returns:
            A map of the N tokens with B rows, or with one row that serves the whole batch.

        Raises:
            ValueError: If the method cannot reach `site.ratio` on this grid, or the site lacks what it reads.
        """
