"""`gen-turbo explain`: one image of what a method does to the tokens of another."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gen_turbo.config import CaptionConfig, ConfigError, PipelineConfig, load_config
from gen_turbo.method import OF_RESIDUALS, Grid, LayerInfo, StepInfo, TokenReducer
from gen_turbo.overlay import arrows_panel, enlarged, groups_panel, heat_panel, kept_panel, layers_strip, sheet
from gen_turbo.tokens.score import mean_one
from gen_turbo.tokens.token_map import TokenMap

# One step from so little noise that the image is still the one given.
_STRENGTH, _STEPS = 0.05, 20


@dataclass
class Trace:
    """What was seen of a method at work on one image.

    Attributes:
        grid: (height, width) in tokens.
        slot: The slot of each token, (N,).
        anchors: The token of each slot that lends it its place; those that stay where tokens are dropped.
        is_dropping: Whether tokens are dropped rather than merged.
        degree: Turbo's information degree of each token, (N,); None for methods without one.
        runs: Whether each decoder layer ran; None where all do.
        said: What the model said about the image.
    """

    grid: Grid
    slot: Tensor
    anchors: list[int]
    is_dropping: bool = False
    degree: Tensor | None = None
    runs: list[bool] | None = None
    said: str = ""


@dataclass
class _Recorder:
    """The first plan that a reducer makes on a grid, with what it was made from."""

    tokens: Tensor | None = None
    site: LayerInfo | None = None
    plan: TokenMap | None = None
    values: dict[str, Tensor | None] = field(default_factory=dict)

    def listen(self, reducer: TokenReducer, kind: str | None) -> None:
        """Notes what this object plans; its class and other objects plan as before."""
        own: Callable[[Tensor, LayerInfo, StepInfo], TokenMap] = reducer.plan

        def plan(tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
            made = own(tokens, site, frame)
            if self.plan is None and site.grid is not None:
                self.tokens, self.site, self.plan = tokens.detach(), site, made
                if kind is not None and site.semantic is not None:
                    self.values[kind] = site.semantic(kind)
            return made

        vars(reducer)["plan"] = plan

    def degree(self, weight: float) -> Tensor | None:
        """The information degree of each token: what it means, less how like another it is.

        Turbo (arXiv 2407.11717): weight * N * A less R; here R is the cosine to the most similar of all others.
        """
        if self.tokens is None or self.site is None:
            return None
        unit = F.normalize(self.tokens[-1].float(), dim=-1)
        likeness = (unit @ unit.T).fill_diagonal_(-torch.inf).amax(1)
        value = next((value for value in self.values.values() if value is not None), None)
        if value is None:
            return -likeness
        return weight * mean_one(value[-1:])[0, -len(unit) :] - likeness


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--image", type=Path, required=True, help="the image to look at")
    parser.add_argument("--processor", required=True, help="a method's name or YAML file")
    parser.add_argument("--output", type=Path, default=Path("explain.png"), help="a .png file (explain.png)")
    parser.add_argument("--config", default="caption", help="a pipeline that reads images or draws them (caption)")
    parser.add_argument("--prompt", help="a question about the image, or what it shows (default: as configured)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as processor.ratio=0.75")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> None:
    """Writes the image and prints its path.

    Raises:
        ValueError: If a file or setting does not fit, or nothing was reduced on a grid.
    """
    named = None if namespace.processor == "null" else namespace.processor
    config = load_config(namespace.config, [("processor", named), *namespace.overrides])
    # A pipeline of two models has no setting `processor` of its own, so the override above was refused.
    assert isinstance(config, (PipelineConfig, CaptionConfig))
    if namespace.output.suffix.lower() != ".png":
        raise ConfigError(f"--output must be a .png file; got {namespace.output}")
    from gen_turbo.factory import build_pipeline, build_processor, quiet_loading
    from gen_turbo.inputs import open_image
    from gen_turbo.output import check_writable, write_image

    check_writable(namespace.output.parent)
    image, processor = open_image(namespace.image), build_processor(config.processor)
    if processor is None:
        raise ConfigError("there is no processor to explain; give one with --processor")
    quiet_loading()
    pipe = build_pipeline(replace(config, processor=None), None)
    explain = explain_reading if isinstance(config, CaptionConfig) else explain_drawing
    trace = explain(pipe, processor, image, namespace.prompt)
    write_image(namespace.output, draw_trace(image, trace))
    print(f"{len(trace.anchors)} of {len(trace.slot)} tokens stay" + (f": {trace.said}" if trace.said else ""))
    print(namespace.output)


def draw_trace(image: Image.Image, trace: Trace) -> Image.Image:
    """Draws the image, what became of its tokens, and for Turbo who joined whom and the information degree."""
    slot = trace.slot.view(trace.grid).numpy()
    count = f"{len(trace.anchors)} of {slot.size} tokens"
    panels = [(trace.said or "image", enlarged(image))]
    if trace.is_dropping:
        is_kept = torch.zeros(slot.size, dtype=torch.bool)
        is_kept[trace.anchors] = True
        panels.append((f"kept: {count}", kept_panel(image, is_kept.view(trace.grid).numpy())))
    else:
        panels.append((f"groups: {count}", groups_panel(image, slot)))
    if trace.degree is not None:
        if not trace.is_dropping:
            panels.append(("merged tokens and their targets", arrows_panel(image, slot, trace.anchors)))
        degree = trace.degree.double().view(trace.grid).numpy()
        panels.append(("information degree, red is high", heat_panel(image, degree)))
    return sheet(panels, None if trace.runs is None else layers_strip(trace.runs, 512))


def explain_reading(pipe: Any, processor: TokenReducer, image: Image.Image, prompt: str | None = None) -> Trace:
    """What a method does to the image tokens while a captioning pipeline reads an image.

    Raises:
        ValueError: If the model's prompt holds no image tokens, or they make no grid.
    """
    from gen_turbo.api import attach
    from gen_turbo.engine.report import report
    from gen_turbo.vlm.grouping import Grouping
    from gen_turbo.vlm.settings import placement_of

    recorder = _recorder(processor)
    reductions: list[Any] = []
    attachment = attach(pipe, processor)
    part: Any = attachment.parts[0]
    try:
        if not part.watch(lambda first, images, reduction: reductions.append(reduction)):
            raise ConfigError(f"text of a {type(part.model).__name__} reads the image on the side; nothing to draw")
        said = pipe(image, prompt).text
        layers = [layer.num_kept > 0 for layer in report(pipe).layers if ".layers." in layer.name]
        groups = part.stage(Grouping)
        slots = groups.slots() if groups is not None else None
    finally:
        attachment.detach()
        vars(processor).pop("plan", None)
    if not reductions or not reductions[0].plans:
        raise ConfigError("no image token left; raise the ratio, or lower the budget")
    group, plan = reductions[0].plans[0]
    if group.grid is None:
        raise ConfigError("the image tokens of this model make no grid; nothing to draw")
    placement = placement_of(processor)
    is_dropping = hasattr(processor, "routing") or placement.combine == "prune" or placement.place == "decoder"
    slot = (plan.slot_BN if slots is None else slots)[0].cpu()
    runs = layers if len(layers) > 1 else None
    degree = _degree(recorder, processor)
    return Trace(group.grid, slot, plan.anchor_BM[0].tolist(), is_dropping, degree, runs, said)


def explain_drawing(pipe: Any, processor: TokenReducer, image: Image.Image, prompt: str | None = None) -> Trace:
    """What a method does to the finest tokens while a pipeline draws an image almost as it is.

    Raises:
        ValueError: If the pipeline cannot start from an image, or nothing was reduced on a grid.
    """
    from diffusers import AutoPipelineForImage2Image

    from gen_turbo.api import attach

    defaults = {setting: getattr(type(processor), setting) for setting in OF_RESIDUALS}
    processor = replace(processor, restore="copy", **defaults)
    recorder = _recorder(processor)
    try:
        drawing = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ConfigError(f"{type(pipe).__name__} cannot start from an image") from error
    model = getattr(pipe, "unet", None) or pipe.transformer
    side = int(model.config.sample_size * pipe.vae_scale_factor)
    drawing.set_progress_bar_config(disable=True)
    with attach(drawing, processor):
        drawing(
            prompt=prompt or "",
            image=image.resize((side, side), Image.Resampling.LANCZOS),
            strength=_STRENGTH,
            num_inference_steps=_STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    plan, site = recorder.plan, recorder.site
    if plan is None or site is None or site.grid is None or plan.is_identity:
        raise ConfigError("no token was reduced on a grid; raise the ratio or take another method")
    return Trace(site.grid, plan.slot_BN[-1].cpu(), plan.anchor_BM[-1].tolist(), degree=_degree(recorder, processor))


def _recorder(processor: TokenReducer) -> _Recorder:
    recorder = _Recorder()
    kind = getattr(processor, "semantic", None)
    recorder.listen(processor, None if kind == "none" else kind)
    return recorder


def _degree(recorder: _Recorder, processor: TokenReducer) -> Tensor | None:
    weight = getattr(processor, "value_weight", None)
    degree = recorder.degree(weight) if weight is not None else None
    return None if degree is None else degree.cpu()
