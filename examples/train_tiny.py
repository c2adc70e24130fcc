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

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from muon import optimisers, set_learning_rate
from safetensors.torch import load_file, save_file
from tiny_data import train_autoencoder, training_set
from torch import Tensor, nn

from gen_turbo.pipelines import tiny

GRIDS = (16, 32, 64)
LEVELS = {16: tiny.LEVELS - 1, 32: tiny.LEVELS - 1, 64: tiny.LEVELS}
BATCH = {16: 48, 32: 24, 64: 8}
LEARNING_RATE = {16: 2.4e-3, 32: 2.4e-3, 64: 1.6e-3}
NOISE_SHIFT = {grid: tiny.NOISE_SHIFT * grid / 64 for grid in GRIDS}
EXACT_KEYS_FROM = 0.75
EXCHANGE_EVERY = 12
AVERAGE = 0.98
DECAY_FROM = {16: 1.0, 32: 0.8, 64: 0.35}


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


class Trainer:
    """UNet, text encoder, their averages and both optimisers, with a checkpoint that holds all of it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self.seen = folder, rank, 0.0
        self.text = tiny.make_text_encoder(len(tiny.make_tokenizer())).train()
        self.spent = dict.fromkeys(map(str, GRIDS), 0.0)
        self.steps = 0
        self.use(tiny.make_unet(LEVELS[GRIDS[0]]))

    def use(self, unet: UNet2DConditionModel) -> None:
        """Trains this UNet from now on; averages and optimisers begin anew."""
        self.unet = unet.to(memory_format=torch.channels_last).train()
        self.levels = len(unet.config.block_out_channels)
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        keep_plain = ("conv_in", "conv_out", "text_model", "embeddings", "encoder.layers", "final_layer_norm")
        self.muon, self.adam = optimisers(self.unet, self.text, keep_plain=keep_plain)
        self.average = [p.detach().clone() for p in self.parameters]

    def grow(self) -> None:
        """Goes on with the averaged weights and a level more."""
        self.swap_average()
        outer = tiny.make_unet(self.levels + 1)
        tiny.grow(self.unet, outer)
        self.use(outer)

    def save(self) -> None:
        """Writes the checkpoint, then the pipeline."""
        tensors = {f"parameter.{i}": p.detach().contiguous() for i, p in enumerate(self.parameters)}
        tensors |= {f"average.{i}": p.contiguous() for i, p in enumerate(self.average)}
        tensors |= {f"muon.{i}": b.contiguous() for i, b in enumerate(self.muon.buffers)}
        save_file(tensors, self.folder / "state.tmp", {"json": json.dumps([self.spent, self.steps, self.levels])})
        (self.folder / "state.tmp").replace(self.folder / "state.safetensors")
        self.export()

    def load(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            self.load_shipped()
            return
        header = int.from_bytes(path.read_bytes()[:8], "little")
        metadata = json.loads(path.read_bytes()[8 : 8 + header])["__metadata__"]
        self.spent, self.steps, levels = json.loads(metadata["json"])
        self.use(tiny.make_unet(levels))
        tensors = load_file(path)
        with torch.no_grad():
            for name, rows in (("parameter", self.parameters), ("average", self.average), ("muon", self.muon.buffers)):
                for i, row in enumerate(rows):
                    row.copy_(tensors[f"{name}.{i}"])
        print("resumed", self.spent, self.steps, flush=True)

    @torch.no_grad()
    def load_shipped(self) -> None:
        """Begins from the weights inside the package, if there are any; the optimisers begin anew."""
        folder = tiny.weights_folder()
        if not (folder / "model_index.json").exists():
            return
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
        self.text.load_state_dict(pipe.text_encoder.state_dict())
        self.use(pipe.unet)
        print("begun from the shipped weights", flush=True)

    @torch.no_grad()
    def exchange(self, grid: int, weight: float = 0.5) -> None:
        """Offers the weights to the other process and moves towards what it offered since the last time."""
        own, other = (self.folder / f"peer_{rank}_{grid}.safetensors" for rank in (self.rank, 1 - self.rank))
        save_file({str(i): p.detach().contiguous() for i, p in enumerate(self.parameters)}, own.with_suffix(".tmp"))
        own.with_suffix(".tmp").replace(own)
        if other.exists() and other.stat().st_mtime > self.seen:
            self.seen = other.stat().st_mtime
            tensors = load_file(other)
            for i, parameter in enumerate(self.parameters):
                parameter.lerp_(tensors[str(i)], weight)

    def export(self) -> None:
        """Writes the averaged weights as a stock pipeline."""
        self.swap_average()
        autoencoder = AutoencoderKL.from_pretrained(self.folder / "vae")
        tiny.assemble(autoencoder, self.text, self.unet).save_pretrained(self.folder / "pipeline")
        self.swap_average()

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchanges the weights and their averages."""
        for parameter, value in zip(self.parameters, self.average, strict=True):
            own = parameter.clone()
            parameter.copy_(value)
            value.copy_(own)

    def run(self, grid: int, seconds: float, latents: Tensor, ids: Tensor, save_every: float = 240.0) -> None:
        """Trains at one resolution until its CPU budget is spent."""
        latents = F.avg_pool2d(latents, 64 // grid)
        empty = tiny.make_tokenizer()([""], padding="max_length", return_tensors="pt").input_ids
        alphas = tiny.alphas_cumprod(NOISE_SHIFT[grid]).float()
        start, last_save = time.process_time() - self.spent[str(grid)], time.process_time()
        running, first, warm = None, True, 0
        last_exchange = self.steps
        if self.rank:
            self.exchange(grid, weight=1.0)
        later = [self.folder / f"peer_0_{g}.safetensors" for g in GRIDS if g > grid]
        while (spent := time.process_time() - start) < seconds:
            done = spent / seconds
            if self.rank and any(path.exists() for path in later):
                break
            if self.steps - last_exchange >= EXCHANGE_EVERY:
                self.exchange(grid)
                last_exchange = self.steps
            pooled = grid == 64 and done < EXACT_KEYS_FROM
            if first or (not pooled and grid == 64):
                self.unet.set_attn_processor(PooledKeys() if pooled else AttnProcessor2_0())
                first = False
            tail = max(0.0, done - DECAY_FROM[grid]) / max(1e-6, 1 - DECAY_FROM[grid])
            warm += 1
            factor = min(1.0, warm / 15) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * tail)))
            set_learning_rate(self.muon, self.adam, LEARNING_RATE[grid] * factor)
            loss = self.step(latents, ids, empty, alphas, BATCH[grid])
            running = loss if running is None else 0.98 * running + 0.02 * loss
            self.spent[str(grid)] = time.process_time() - start
            if self.steps % 25 == 0:
                print(f"{grid} step {self.steps} {spent:.0f}s loss {running:.4f}", flush=True)
            if self.rank == 0 and time.process_time() - last_save > save_every:
                self.save()
                last_save = time.process_time()
        self.unet.set_attn_processor(AttnProcessor2_0())
        if self.rank == 0:
            self.save()

    def step(self, latents: Tensor, ids: Tensor, empty: Tensor, alphas: Tensor, batch: int) -> float:
        """Takes one step on random rows at stratified times; gives the loss."""
        rows = torch.randint(0, len(latents), (batch,))
        clean, prompt = latents[rows], ids[rows].clone()
        prompt[torch.rand(batch) < 0.1] = empty
        times = ((torch.arange(batch) + torch.rand(1)) / batch * tiny.NUM_TRAIN_STEPS).long()
        times = times.clamp(0, tiny.NUM_TRAIN_STEPS - 1)[torch.randperm(batch)]
        signal, noise = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        epsilon = torch.randn_like(clean)
        noisy = (signal * clean + noise * epsilon).contiguous(memory_format=torch.channels_last)
        output = self.unet(noisy, times, self.text(prompt).last_hidden_state).sample
        loss = F.mse_loss(output, signal * epsilon - noise * clean)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.muon.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.steps += 1
        weight = 1 - min(AVERAGE, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], weight)
        return loss.item()


def ship(folder: Path) -> None:
    """Puts the averaged weights into the package, in half precision."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline", safety_checker=None, dtype=torch.float16)
    pipe.save_pretrained(tiny.weights_folder(), safe_serialization=True)


def main() -> None:
    """Runs every stage whose budget is not spent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs=4, default=[300, 900, 1800, 2400])
    parser.add_argument("--output", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0, choices=(0, 1), help="1 for the helping process")
    parser.add_argument("--ship", action="store_true", help="train nothing; put the result into the package")
    arguments = parser.parse_args()
    if arguments.ship:
        ship(arguments.output)
        return
    torch.set_num_threads(1)
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    shipped = tiny.weights_folder() / "vae"
    if not (folder / "vae" / "config.json").exists() and (shipped / "config.json").exists():
        AutoencoderKL.from_pretrained(shipped, dtype=torch.float32).save_pretrained(folder / "vae")
    if not (folder / "vae" / "config.json").exists():
        train_autoencoder(folder, arguments.seconds[0])
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").eval()
    latents, ids = training_set(folder, autoencoder, arguments.scenes, arguments.seed)
    print("latents", tuple(latents.shape), float(latents.std()), flush=True)
    torch.manual_seed(arguments.seed + 100 * arguments.rank)
    trainer = Trainer(folder, arguments.rank)
    trainer.load()
    for grid, seconds in zip(GRIDS, arguments.seconds[1:], strict=True):
        if trainer.spent[str(grid)] >= seconds or trainer.levels > LEVELS[grid]:
            continue
        if trainer.levels < LEVELS[grid]:
            trainer.grow()
        trainer.run(grid, seconds, latents, ids)


if __name__ == "__main__":
    main()
