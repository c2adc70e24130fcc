"""What is checked on every family of denoisers, and how the keys that attention sees are counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from stated import TurboProcessor
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.engine.graphs import GraphsWarning
from tests import tiny_hosts, tiny_transformers
from tests.engine.cuda import stand_in
from tests.snapshots import differences, model_state

UNETS = tuple(tiny_hosts.UNETS)
CONTROL_NET = "controlnet"
NAMES = (*UNETS, CONTROL_NET, *tiny_transformers.FAMILIES)
TIMES = (900, 700, 500)
"""With two full steps at the beginning, the third is the first that is corrected."""
CAPTURED_TIMES = (900, 750, 600, 450, 300)
VARIANTS: dict[str, dict[str, object]] = {
    "corrected": {},
    "copied": {"restore": "copy"},
    "full queries": {"restore": "copy", "kv_only": True},
    "size-weighted": {"restore": "copy", "proportional_attention": True},
    "kernel by name": {"attention_backend": "native"},
    "block corrected": {"scope": "block"},
    "block copied": {"scope": "block", "restore": "copy"},
    "runs of blocks": {"scope": "block", "merge_span": 0},
    "whole model": {"scope": "model", "restore": "copy"},
}
CELLS = {
    "nothing removed": "bit-identical",
    "detached": "as before",
}
CAPTURED = ("corrected", "block copied", "whole model")
"""What CUDA graphs are made of, by the stand-in for a GPU."""
COLUMNS = (*CELLS, *VARIANTS, "text merged", "CUDA graphs")
NO_SPANS = ("hunyuan-dit", "hidream", "ernie-image")
"""Blocks that are linked to each other by more than their tokens, or between which the model reads every token."""
NO_BLOCKS = ("kandinsky",)
"""Attention on maps between convolutions: there is no block of tokens to merge."""


class Keys(TorchFunctionMode):
    """Records (queries, keys) of each attention call that really runs, and lets the call through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
        if func is F.scaled_dot_product_attention:
            self.seen.append((given["query"].shape[-2], given["key"].shape[-2]))
        return func(*args, **(kwargs or {}))


def family(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The model of a family and what runs it."""
    if name in UNETS:
        model = tiny_hosts.UNETS[name]()

        def run(batch: int = 2, grid: tuple[int, int] = (16, 16), **kwargs: object) -> Tensor:
            return tiny_hosts.run_unet(model, **tiny_hosts.unet_inputs(batch, grid), **kwargs)

        return model, run
    if name == CONTROL_NET:
        control = tiny_hosts.control_net()

        def run_control(batch: int = 2, grid: tuple[int, int] = (16, 16), **kwargs: object) -> Tensor:
            return tiny_hosts.run_control_net(control, **tiny_hosts.unet_inputs(batch, grid), **kwargs)

        return control, run_control
    built = tiny_transformers.build(name)
    return built, lambda **kwargs: tiny_transformers.run(name, built, **kwargs)


def is_refused(name: str, settings: dict[str, object]) -> bool:
    """Whether a variant is refused by name on a family."""
    scope = settings.get("scope")
    no_stack = (*UNETS, CONTROL_NET, *NO_BLOCKS, *NO_SPANS)
    return (scope == "block" and name in NO_BLOCKS) or (scope == "model" and name in no_stack)


def relative(a: Tensor, b: Tensor) -> float:
    """Distance of a to b, by the size of b."""
    return ((a - b).norm() / b.norm()).item()


def cell(name: str, column: str) -> str:
    """Runs one check on one family and says what came out; a check that fails raises AssertionError."""
    if column == "nothing removed":
        return _nothing_removed(name)
    if column == "detached":
        return _detached(name)
    if column == "CUDA graphs":
        return _captured(name)
    if column == "text merged":
        return _variant(name, {"text_ratio": 0.4, "restore": "copy"})
    return _variant(name, VARIANTS[column])


def _nothing_removed(name: str) -> str:
    model, run = _kept(name)
    stock, _ = _stock(name)
    scopes = [TurboProcessor(0.0, scope=scope) for scope in ("attention", "block", "model")]
    for processor in (*scopes, IdentityProcessor(0.4)):
        if not is_refused(name, {"scope": processor.scope}):
            with attach(model, processor):
                assert torch.equal(run(times=TIMES), stock)
    return CELLS["nothing removed"]


def _detached(name: str) -> str:
    model, run = family(name)
    for scope in ("attention", "block"):
        if is_refused(name, {"scope": scope}):
            continue
        untouched = model_state(model)
        run(times=TIMES[:1])
        before = model_state(model)
        own = differences(untouched, before)
        attachment = attach(model, TurboProcessor(0.4, scope=scope, warmup_steps=1))
        try:
            with attachment:
                run(times=TIMES[:2])
                layer = model.get_submodule(attachment.layers[-1])
                handle = next(layer.children()).register_forward_pre_hook(_break)
                try:
                    run(times=TIMES[:1])
                finally:
                    handle.remove()
        except ZeroDivisionError:
            attachment.detach()
        assert [key for key in differences(before, model_state(model)) if key not in own] == []
    return CELLS["detached"]


def _captured(name: str) -> str:
    """Runs each of `CAPTURED` three times with graphs; every output must be the eager one."""
    model, run = _kept(name)
    told, num_scopes = set(), 0
    with pytest.MonkeyPatch.context() as patches, warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphsWarning)
        cuda = stand_in(patches)
        for settings in (VARIANTS[variant] for variant in CAPTURED):
            if is_refused(name, settings) or (name in NO_SPANS and settings.get("scope") == "model"):
                continue
            processor = TurboProcessor(0.4, **settings)
            with attach(model, processor, graphs=False):
                expected = run(times=CAPTURED_TIMES)
            with attach(model, processor, graphs=True):
                for _ in range(2):
                    assert torch.equal(run(times=CAPTURED_TIMES), expected)
                cuda.since()
                assert torch.equal(run(times=CAPTURED_TIMES), expected)
                seen, status = cuda.since(), report(model).graphs
            assert seen == ((0, len(CAPTURED_TIMES)) if status == "captured" else (0, 0))
            told.add(status)
            num_scopes += 1
    (status,) = told
    return f"bit-identical, {num_scopes} scope{'s' * (num_scopes > 1)}" if status == "captured" else status


def _break(module: nn.Module, args: object) -> None:
    raise ZeroDivisionError


def _variant(name: str, settings: dict[str, object]) -> str:
    model, run = _kept(name)
    stock, stock_seen = _stock(name)
    processor = TurboProcessor(0.4, **settings)
    try:
        attachment = attach(model, processor)
    except ValueError as error:
        return f"refused: {str(error).split(' in ')[0]}"
    num_calls = 1 if processor.restore == "copy" else len(TIMES)
    with attachment, Keys() as keys:
        reduced = run(times=TIMES[:num_calls])
        rows = [layer for layer in report(model).layers if layer.status == "reduced"]
    stock = stock[:num_calls]
    assert rows and reduced.shape == stock.shape and 0 < relative(reduced, stock) < 0.8
    for row in rows:
        frame = row.grid[0] * row.grid[1]
        num_frames = row.num_tokens // frame
        assert row.num_reduced > 0 and row.num_kept == num_frames * (frame - int(frame * 0.4))
    # What no row shows is cut wherever anything is merged.
    known = tiny_transformers.FAMILIES.get(name)
    num_text = int(tiny_transformers.NUM_TEXT * (processor.text_ratio or 0)) + (known.num_hidden if known else 0)
    _check_lengths(stock_seen, keys.seen, rows[0].num_tokens - rows[0].num_kept, num_text, processor.kv_only)
    return f"{len(rows)}: {rows[0].num_tokens}\u2192{rows[0].num_kept}"


def _check_lengths(
    stock: list[tuple[int, int]], seen: list[tuple[int, int]], removed: int, text: int, keeps_queries: bool
) -> None:
    """The longest attention of the stock model must have run on so many keys less, and on as many queries less.

    Text asks nothing where there are more keys than queries.
    """
    num_keys = max(key for _, key in stock)
    num_queries = max(query for query, _ in stock)
    queries = {query for query, key in seen if key == num_keys - removed - text}
    # Sound asks video too, in which it is as long as ever.
    others = {query for query, key in stock if key == num_keys and query != num_queries}
    assert queries - others == {num_queries - text * (num_queries == num_keys) - (0 if keeps_queries else removed)}


@cache
def _kept(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A family that several cells share; each leaves it as it was."""
    return family(name)


@cache
def _stock(name: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """The outputs of the stock model, and the lengths of its attention calls."""
    with Keys() as keys:
        outputs = _kept(name)[1](times=TIMES)
    return outputs, keys.seen
