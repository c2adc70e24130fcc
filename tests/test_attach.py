"""Attaching several models is one act: where one of them fails, everything is as it was."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import ToMeProcessor, TurboProcessor, attach
from gen_turbo.api import attachments
from gen_turbo.engine.root import Root
from gen_turbo.vlm.gate import Gate
from tests.engine.test_branches import two_models
from tests.snapshots import differences, model_state
from tests.tiny_hosts import image, sd_pipeline
from tests.vlm.tiny_vlms import VLMS


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_attach_that_fails_halfway_leaves_nothing(error, is_replaced, monkeypatch):
    """Catches layers that stay in place when the last step of an attach fails, and the old processor lost."""
    pipe = sd_pipeline()
    stock = model_state(pipe.unet)
    if is_replaced:
        attach(pipe, ToMeProcessor(0.4))
        expected = image(pipe)
    install = Root.install

    def fails(root):
        if isinstance(root.owner.reducer, TurboProcessor):
            raise error("no more")
        install(root)

    monkeypatch.setattr(Root, "install", fails)
    with pytest.raises(error, match="no more"):
        attach(pipe, TurboProcessor(0.4), replace=True)
    parts = attachments(pipe)
    assert [type(part.reducer) for part in parts] == [ToMeProcessor] * is_replaced
    if is_replaced:
        assert torch.equal(image(pipe), expected)
        parts[0].remove()
    assert differences(stock, model_state(pipe.unet)) == []


def test_a_second_model_that_fails_takes_the_first_off(monkeypatch):
    """Catches one of two models that stays attached alone."""
    pipe, _ = two_models()
    models = [pipe.transformer, pipe.transformer_2]
    before, install = list(map(model_state, models)), Root.install

    def fails(root):
        if root.module is models[1]:
            raise RuntimeError("no more")
        install(root)

    monkeypatch.setattr(Root, "install", fails)
    with pytest.raises(RuntimeError, match="no more"):
        attach(pipe, TurboProcessor(0.4))
    assert attachments(pipe) == []
    assert all(differences(state, model_state(model)) == [] for state, model in zip(before, models, strict=True))


def test_a_vision_language_model_that_fails_is_stock(monkeypatch):
    """Catches hooks of the stages before the one that failed."""
    model = VLMS["llava"].make("sdpa")
    before = model_state(model)

    def fails(gate, model):
        raise RuntimeError("no more")

    monkeypatch.setattr(Gate, "install", fails)
    with pytest.raises(RuntimeError, match="no more"):
        attach(model, TurboProcessor(0.5))
    assert differences(before, model_state(model)) == []
