"""Training data of the embedded models: rendered scenes, the autoencoder and its latents."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from muon import optimisers, set_learning_rate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gen_turbo.pipelines import tiny
from gen_turbo.scenes import all_scenes, is_held_out, render


def drawn(count: int, seed: int) -> list[tuple[str, int, str]]:
    """Training scenes as (caption, seed of the rendering, prompt); one prompt in ten names no position."""
    rng = random.Random(seed)
    scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
    rows = []
    for _ in range(count):
        scene, look = rng.choice(scenes), rng.randrange(2**31)
        prompt = scene.caption.replace(f"the {scene.position} of ", "") if rng.random() < 0.1 else scene.caption
        rows.append((scene.caption, look, prompt))
    return rows


def images(count: int, seed: int) -> Tensor:
    """Training scenes as uint8 (count, 3, 128, 128)."""
    rows = [np.asarray(render(caption, look)).transpose(2, 0, 1) for caption, look, _ in drawn(count, seed)]
    return torch.from_numpy(np.stack(rows))


def train_autoencoder(folder: Path, seconds: float) -> AutoencoderKL:
    """Trains on 64 x 64 pixel crops and saves the result."""
    torch.manual_seed(0)
    drawn_images = images(3000, seed=1)
    model = tiny.make_autoencoder()
    muon, adam = optimisers(model, keep_plain=("conv_in", "conv_out.", "quant"))
    start, step = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds:
        factor = min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * spent / seconds)) + 0.005
        set_learning_rate(muon, adam, 4e-3 * factor)
        y, x = (int(v) for v in torch.randint(0, 65, (2,)))
        batch = drawn_images[torch.randint(0, len(drawn_images), (4,)), :, y : y + 64, x : x + 64].float() / 127.5 - 1
        posterior = model.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist
        output = model.decode(posterior.sample()).sample
        error = F.mse_loss(output, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.smooth_l1_loss(output, batch, beta=0.05) + error + 3e-4 * kl
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        muon.step()
        model.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"autoencoder {step} {spent:.0f}s {10 * math.log10(4 / error.item()):.1f} dB", flush=True)
    model.eval()
    with torch.no_grad():
        latents = model.encode(drawn_images[:64].float() / 127.5 - 1).latent_dist.mean
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    model.save_pretrained(folder / "vae")
    return model


@torch.no_grad()
def training_set(folder: Path, autoencoder: AutoencoderKL, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Scaled latents (count, 4, 64, 64), kept in the folder, and their prompts."""
    path = folder / f"latents_{seed}.safetensors"
    if not path.exists():
        latents = [
            autoencoder.encode(part.float() / 127.5 - 1).latent_dist.mean * autoencoder.config.scaling_factor
            for part in images(count, seed).split(40)
        ]
        save_file({"latents": torch.cat(latents).contiguous()}, path)
    return load_file(path)["latents"], [prompt for _, _, prompt in drawn(count, seed)]


def trained_autoencoder(folder: Path, seconds: float) -> AutoencoderKL:
    """The autoencoder of a run's folder; if there is none, the one inside the package, else a newly trained one."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = tiny.weights_folder() / "vae"
    if not (folder / "vae" / "config.json").exists():
        if (shipped / "config.json").exists():
            AutoencoderKL.from_pretrained(shipped, dtype=torch.float32).save_pretrained(folder / "vae")
        else:
            train_autoencoder(folder, seconds)
    return AutoencoderKL.from_pretrained(folder / "vae").eval()
