"""What every test shares: no network, a fixed search for counterexamples, one small checkpoint."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Two threads that wait for each other are many times slower than one wherever anything else runs.
torch.set_num_threads(1)
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded model's classes at random weights."""
    from gen_turbo.pipelines import tiny

    folder = tmp_path_factory.mktemp("checkpoint")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    text_encoder = tiny.make_text_encoder(len(tiny.make_tokenizer()))
    tiny.assemble(tiny.make_autoencoder(), text_encoder, tiny.make_unet()).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the embedded vision-language model's classes at random weights."""
    from gen_turbo.pipelines import tiny_vlm

    folder = tmp_path_factory.mktemp("vlm")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = tiny_vlm.make_model()
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tiny_vlm.make_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with three images in `in`, and a model that draws them."""
    from gen_turbo.commands import caption
    from tests.stub_pipelines import GenerateStub, image

    (tmp_path / "in").mkdir()
    for number in range(3):
        image(number).save(tmp_path / "in" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption, "build_pipeline", lambda config, processor: GenerateStub())
    return tmp_path
