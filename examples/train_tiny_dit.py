"""Trains the embedded diffusion transformer on one CPU core; stop it at any time, run it again to go on.

python examples/train_tiny_dit.py --seconds 900 1900 9000 --output runs/tiny-dit

The three budgets are CPU seconds with 64, 256 and 1,024 image tokens. The coarse ones see the noisy latents of the
last, pooled, and predict its flow, pooled, so noise levels and places mean the same in all and the weights carry over.
The 256 text tokens of zeros that the pipeline appends are one token here, counted 256 times: the same attention at a
fraction of the cost.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from tiny_data import trained_autoencoder, training_set
from torch import Tensor, nn
from training import Stage, Trainer, parsed

from gen_turbo.pipelines import tiny, tiny_dit

STAGES = (
    Stage("64", 4, batch=32, learning_rate=2e-3, decay_from=0.8),
    Stage("256", 2, batch=16, learning_rate=2e-3, decay_from=0.7),
    Stage("1024", 1, batch=6, learning_rate=1.2e-3, decay_from=0.35),
)
EMPTY_PROMPTS = 0.1


class CountedAttention(JointAttnProcessor2_0):
    """Joint attention whose last text token counts as many."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attends over (B, N, C) image and (B, T, C) text tokens without a mask; gives both."""

        def heads(x: Tensor, norm: nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm is not None else x

        image = [
            heads(attn.to_q(hidden_states), attn.norm_q),
            heads(attn.to_k(hidden_states), attn.norm_k),
            heads(attn.to_v(hidden_states), None),
        ]
        text = [
            heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q),
            heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k),
            heads(attn.add_v_proj(encoder_hidden_states), None),
        ]
        q, k, v = (torch.cat(pair, 2) for pair in zip(image, text, strict=True))
        log_count = torch.zeros(k.shape[2])
        log_count[-1] = math.log(tiny_dit.NUM_PADDING)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=log_count.expand(1, 1, q.shape[2], -1))
        output = output.transpose(1, 2).flatten(2)
        shown, read = output.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](shown), read if attn.context_pre_only else attn.to_add_out(read)


class TransformerTraining:
    """The transformer and its two text encoders, what is lost on a batch, and how they become a pipeline."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        keep_plain = ("pos_embed", "proj_out", "embedder", "text_model", "text_projection", "norm1", "norm_out")
        self.trainer = Trainer(folder, rank, keep_plain)
        tokenizer = tiny_dit.make_tokenizer()
        self.empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        if not self.trainer.resume(self.make):
            self.begin()

    def make(self, pool: int) -> list[nn.Module]:
        """Fresh models, the transformer for latents pooled by this factor."""
        transformer = tiny_dit.make_transformer(pool)
        transformer.set_attn_processor(CountedAttention())
        return [transformer, tiny_dit.make_text_encoder(), tiny_dit.make_text_encoder()]

    def begin(self) -> None:
        """Begins from the weights inside the package, if there are any."""
        folder = tiny.weights_folder().parent / "tiny-dit"
        models, pool = self.make(STAGES[0].size), STAGES[0].size
        if (folder / "model_index.json").exists():
            pipe = StableDiffusion3Pipeline.from_pretrained(
                folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
            )
            models, pool = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2], 1
            pipe.transformer.set_attn_processor(CountedAttention())
            print("begun from the shipped weights", flush=True)
        self.trainer.use(models, pool)

    def run(self, stage: Stage, seconds: float, latents: Tensor, ids: Tensor) -> None:
        """Trains one stage, after going to its resolution if need be."""
        trainer = self.trainer
        if trainer.spent.get(stage.name, 0.0) >= seconds or trainer.size < stage.size:
            return
        if trainer.size > stage.size:
            self.refine(stage.size)
        trainer.fit(stage, seconds, lambda batch, _: self.loss(latents, ids, batch), self.export)

    def refine(self, pool: int) -> None:
        """Goes on with the averaged weights at a finer resolution."""
        fine = self.make(pool)
        with self.trainer.averaged():
            fine[0].load_state_dict(tiny_dit.weights(self.trainer.models[0]), strict=False)
            for old, new in zip(self.trainer.models[1:], fine[1:], strict=True):
                new.load_state_dict(old.state_dict())
        self.trainer.use(fine, pool)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Text tokens (B, 21, C), the last one of zeros, and the pooled text (B, C), as the pipeline makes them."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.trainer.models[1:]]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return F.pad(tokens, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], -1)

    def loss(self, latents: Tensor, ids: Tensor, batch: int) -> Tensor:
        """The error of the predicted flow on random rows at stratified times."""
        rows = torch.randint(0, len(latents), (batch,))
        clean, prompt = latents[rows], ids[rows].clone()
        prompt[torch.rand(batch) < EMPTY_PROMPTS] = self.empty
        uniform = ((torch.arange(batch) + torch.rand(1)) / batch)[torch.randperm(batch)]
        sigma = tiny_dit.SHIFT * uniform / (1 + (tiny_dit.SHIFT - 1) * uniform)
        noise = torch.randn_like(clean)
        clean, noise = (F.avg_pool2d(x, self.trainer.size) for x in (clean, noise))
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        tokens, pooled = self.encode(prompt)
        flow = self.trainer.models[0](noisy, tokens, pooled, 1000 * sigma).sample
        return F.mse_loss(flow, noise - clean)

    def export(self) -> None:
        """Writes the averaged weights as a stock pipeline."""
        with self.trainer.averaged():
            autoencoder = AutoencoderKL.from_pretrained(self.folder / "vae")
            transformer, *encoders = self.trainer.models
            tiny_dit.assemble(autoencoder, tuple(encoders), transformer).save_pretrained(self.folder / "pipeline")


def ship(folder: Path) -> None:
    """Puts the averaged weights into the package, in half precision."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder / "pipeline", text_encoder_3=None, tokenizer_3=None, dtype=torch.float16
    )
    pipe.save_pretrained(tiny.weights_folder().parent / "tiny-dit", safe_serialization=True)


def main() -> None:
    """Runs every stage whose budget is not spent."""
    arguments = parsed(__doc__.splitlines()[0], [900, 1900, 9000], Path("runs/tiny-dit"))
    if arguments.ship:
        ship(arguments.output)
        return
    torch.set_num_threads(1)
    folder: Path = arguments.output
    latents, prompts = training_set(folder, trained_autoencoder(folder, 0), arguments.scenes, arguments.seed)
    ids = tiny_dit.make_tokenizer()(prompts, padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(arguments.seed + 100 * arguments.rank)
    training = TransformerTraining(folder, arguments.rank)
    for stage, seconds in zip(STAGES, arguments.seconds, strict=True):
        training.run(stage, seconds, latents, ids)


if __name__ == "__main__":
    main()
