"""Trains the embedded text-to-image model on one CPU core; stop it at any time, run it again to go on.

Without a checkpoint in the output folder it begins from the weights inside the package, if there are any.

python examples/train_tiny.py --seconds 300 900 1800 2400 --output runs/tiny

The four budgets are CPU seconds for the autoencoder and for the UNet at 16, 32 and 64 latents. Low resolutions
see average-pooled latents and train the inner network alone; at 64 latents a level is put around it, so that what
it learnt keeps its scale, and the noise is shifted so that it keeps its strength there. Matrices and convolutions
take orthogonalised momentum steps (Muon, Jordan et al., 2024), everything else AdamW. A second process with
`--rank 1` helps the first: every few steps the two exchange and average their weights (local SGD). At 64 latents
most steps attend to 2 x 2 pooled keys, the last part to all of them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from tiny_data import trained_autoencoder, training_set
from torch import Tensor, nn
from training import Stage, Trainer, parsed

from gen_turbo.pipelines import tiny

STAGES = (
    Stage("16", tiny.LEVELS - 1, batch=48, learning_rate=2.4e-3, decay_from=1.0),
    Stage("32", tiny.LEVELS - 1, batch=24, learning_rate=2.4e-3, decay_from=0.8),
    Stage("64", tiny.LEVELS, batch=8, learning_rate=1.6e-3, decay_from=0.35),
)
EXACT_KEYS_FROM = 0.75


class PooledKeys(AttnProcessor2_0):
    """Self-attention of the top level over 2 x 2 pooled keys: a cheap stand-in while training."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends; cross-attention and coarser levels as usual."""
        side = math.isqrt(hidden_states.shape[1])
        if encoder_hidden_states is None and side >= 64:
            grid = hidden_states.transpose(1, 2).unflatten(2, (side, side))
            encoder_hidden_states = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


class UNetTraining:
    """The UNet and its text encoder, what is lost on a batch, and how they become a pipeline."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        keep_plain = ("conv_in", "conv_out", "text_model", "embeddings", "encoder.layers", "final_layer_norm")
        self.trainer = Trainer(folder, rank, keep_plain)
        self.empty = tiny.make_tokenizer()([""], padding="max_length", return_tensors="pt").input_ids
        if not self.trainer.resume(self.make):
            self.begin()

    def make(self, levels: int) -> list[nn.Module]:
        """Fresh models, the UNet with so many levels."""
        text = tiny.make_text_encoder(len(tiny.make_tokenizer()))
        return [tiny.make_unet(levels).to(memory_format=torch.channels_last), text]

    def begin(self) -> None:
        """Begins from the weights inside the package, if there are any."""
        folder = tiny.weights_folder()
        if not (folder / "model_index.json").exists():
            self.trainer.use(self.make(STAGES[0].size), STAGES[0].size)
            return
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
        unet = pipe.unet.to(memory_format=torch.channels_last)
        self.trainer.use([unet, pipe.text_encoder], len(unet.config.block_out_channels))
        print("begun from the shipped weights", flush=True)

    def run(self, stage: Stage, seconds: float, latents: Tensor, ids: Tensor) -> None:
        """Trains one stage, after growing the network if the stage needs it."""
        trainer = self.trainer
        if trainer.spent.get(stage.name, 0.0) >= seconds or trainer.size > stage.size:
            return
        if trainer.size < stage.size:
            self.grow()
        latents = F.avg_pool2d(latents, 64 // int(stage.name))
        alphas = tiny.alphas_cumprod(tiny.NOISE_SHIFT * int(stage.name) / 64).float()
        is_full = int(stage.name) == 64
        if is_full:
            self.unet.set_attn_processor(PooledKeys())

        def loss(batch: int, done: float) -> Tensor:
            if is_full and done >= EXACT_KEYS_FROM:
                self.unet.set_attn_processor(AttnProcessor2_0())
            return self.loss(latents, ids, alphas, batch)

        trainer.fit(stage, seconds, loss, self.export)
        self.unet.set_attn_processor(AttnProcessor2_0())

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet that is trained now."""
        return self.trainer.models[0]

    def grow(self) -> None:
        """Goes on with the averaged weights and a level more."""
        levels = self.trainer.size + 1
        outer, _ = self.make(levels)
        text = self.trainer.models[1]
        with torch.no_grad(), self.trainer.averaged():
            tiny.grow(self.unet, outer)
            kept = {name: value.clone() for name, value in text.state_dict().items()}
        text.load_state_dict(kept)
        self.trainer.use([outer, text], levels)

    def loss(self, latents: Tensor, ids: Tensor, alphas: Tensor, batch: int) -> Tensor:
        """The error of the predicted velocity on random rows at stratified times."""
        rows = torch.randint(0, len(latents), (batch,))
        clean, prompt = latents[rows], ids[rows].clone()
        prompt[torch.rand(batch) < 0.1] = self.empty
        times = ((torch.arange(batch) + torch.rand(1)) / batch * tiny.NUM_TRAIN_STEPS).long()
        times = times.clamp(0, tiny.NUM_TRAIN_STEPS - 1)[torch.randperm(batch)]
        signal, noise = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        epsilon = torch.randn_like(clean)
        noisy = (signal * clean + noise * epsilon).contiguous(memory_format=torch.channels_last)
        output = self.unet(noisy, times, self.trainer.models[1](prompt).last_hidden_state).sample
        return F.mse_loss(output, signal * epsilon - noise * clean)

    def export(self) -> None:
        """Writes the averaged weights as a stock pipeline."""
        with self.trainer.averaged():
            autoencoder = AutoencoderKL.from_pretrained(self.folder / "vae")
            tiny.assemble(autoencoder, self.trainer.models[1], self.unet).save_pretrained(self.folder / "pipeline")


def ship(folder: Path) -> None:
    """Puts the averaged weights into the package, in half precision."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline", safety_checker=None, dtype=torch.float16)
    pipe.save_pretrained(tiny.weights_folder(), safe_serialization=True)


def main() -> None:
    """Runs every stage whose budget is not spent."""
    arguments = parsed(__doc__.splitlines()[0], [300, 900, 1800, 2400], Path("runs/tiny"))
    if arguments.ship:
        ship(arguments.output)
        return
    torch.set_num_threads(1)
    folder: Path = arguments.output
    autoencoder = trained_autoencoder(folder, arguments.seconds[0])
    latents, captions = training_set(folder, autoencoder, arguments.scenes, arguments.seed)
    ids = tiny.make_tokenizer()(captions, padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(arguments.seed + 100 * arguments.rank)
    training = UNetTraining(folder, arguments.rank)
    for stage, seconds in zip(STAGES, arguments.seconds[1:], strict=True):
        training.run(stage, seconds, latents, ids)


if __name__ == "__main__":
    main()
