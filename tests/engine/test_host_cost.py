"""What a reduced call costs on the host: our Python frames, the files they are in, and operators beside the layer's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from stated import TurboProcessor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

import gen_turbo
from gen_turbo import attach
from gen_turbo.engine.layer import Phase, ReducedLayer
from tests.engine.families import family

PACKAGE = str(Path(gen_turbo.__file__).parent)
TIMES = (900, 800, 700, 600)
"""In the last of them every layer is reduced, with a map that was made before."""
ATTENTION = {
    "residual": {"full_every": 8},
    "copied": {"restore": "copy", "match_every": 0},
}
BLOCKS = {kind: settings | {"scope": "block"} for kind, settings in ATTENTION.items()}
MOST_FILES = 4


class Frames:
    """Notes our own frames between entering and leaving each reduced layer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Phase, list[str]]] = []
        self._layer: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "return" and frame is self._layer:
            self._layer = None
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        owner = frame.f_locals.get("self")
        if self._layer is None and code.co_name == "forward" and isinstance(owner, ReducedLayer):
            self._layer = frame
            self.calls.append((owner.phase, []))
        if self._layer is not None:
            self.calls[-1][1].append(code.co_filename)


def reduced_calls(name: str, settings: dict[str, object]) -> list[list[str]]:
    """The files of our frames in each reduced call of the last step of a second run."""
    model, run = family(name)
    with attach(model, TurboProcessor(0.4, **settings)) as attachment:
        run(times=TIMES)
        frames = Frames()
        sys.setprofile(frames)
        try:
            run(times=TIMES)
        finally:
            sys.setprofile(None)
        last = frames.calls[-len(attachment.layers) :]
    assert {phase for phase, _ in last} == {Phase.REDUCED}
    return [files for _, files in last]


MODELS = ("sd15", "sdxl", "pixart-sigma", "sd3", "wan", "flux")


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
def test_frames_of_a_reduced_attention_call(name, kind):
    """Catches layers that climb through wrappers, look things up, or take rows of positions once more."""
    assert max(map(len, reduced_calls(name, ATTENTION[kind]))) <= 3


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
def test_frames_of_a_reduced_block_call(name, kind):
    """Catches blocks that do more than attention does."""
    first, *others = map(len, reduced_calls(name, BLOCKS[kind]))
    # Wan's blocks may be given a time per token as well, of which the first of a step takes the rows.
    assert max(others) <= 3 and first <= 3 + (name == "wan")


def test_a_layer_at_rest_adds_one_frame():
    """Catches work in full steps, and in a model from which nothing is removed."""
    model, run = family("sd15")
    with attach(model, TurboProcessor(0.0)):
        frames = Frames()
        sys.setprofile(frames)
        try:
            run(times=TIMES)
        finally:
            sys.setprofile(None)
    assert {(phase, len(files)) for phase, files in frames.calls} == {(Phase.FULL, 1)}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "pixart-sigma", "wan"])
def test_files_that_a_reduced_attention_call_passes(name):
    """Catches a call that nobody can follow, from file to file."""
    for settings in ATTENTION.values():
        assert len({file for files in reduced_calls(name, settings) for file in files}) <= MOST_FILES


class Operators(TorchDispatchMode):
    """Counts what is dispatched and computes something; a view launches no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not _is_view(func)
        return func(*args, **(kwargs or {}))

    def counted(self, function: Callable[..., object], into: list[int]) -> Callable[..., object]:
        """The same function, which notes how many operators it took."""

        def call(*args: object, **kwargs: object) -> object:
            before = self.count
            output = function(*args, **kwargs)
            into.append(self.count - before)
            return output

        return call


def _is_view(func: OpOverload) -> bool:
    is_alias = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return is_alias or func is torch.ops.aten._unsafe_view.default


def more_operators(name: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Operators of a reduced call beyond those of the stock layer inside of it, by layer."""
    model, run = family(name)
    operators = Operators()
    with attach(model, TurboProcessor(0.4, **settings)) as attachment, monkeypatch.context() as patch:
        whole: list[list[int]] = []
        inside: list[list[int]] = []
        for layer in attachment.parts[0].layers:
            whole.append([])
            inside.append([])
            patch.setattr(layer.module, "forward", operators.counted(layer.module.forward, whole[-1]))
            patch.setattr(layer, "inner", operators.counted(layer.inner, inside[-1]))
            # What the layer computes is the same; past its forward nobody would count.
            patch.setattr(layer, "attention", None)
        with operators:
            run(times=TIMES)
        return [a[-1] - b[-1] for a, b in zip(whole, inside, strict=True)]


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        # embedding_bag and index_select; with residuals addmv_ too.
        *((name, "copied", 2) for name in MODELS),
        # One more where the text that the layer gives is read, for what is remembered of that.
        *((name, "residual", 3 + (name in ("sd3", "flux"))) for name in MODELS),
    ],
)
def test_operators_beside_those_of_the_stock_layer(name, kind, most, monkeypatch):
    """Catches scatter, sort, casts and copies around a layer, a pass per term, and rows of positions taken anew."""
    more = more_operators(name, ATTENTION[kind], monkeypatch)
    # The last layer of SD3, and Flux's of one stream, give no text that anybody reads.
    assert 0 < max(more) <= most and more[-1] <= 3


@pytest.mark.parametrize(
    ("name", "most"), [("sd15", 6), ("sdxl", 6), ("pixart-sigma", 6), ("sd3", 6), ("wan", 5), ("flux", 7)]
)
def test_operators_beside_those_of_the_stock_block(name, most, monkeypatch):
    """Catches an operator that is added to the six of blocks: their input comes off before and is added after."""
    assert 0 < max(more_operators(name, BLOCKS["residual"], monkeypatch)) <= most
