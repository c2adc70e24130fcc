"""Trains the embedded vision-language model on one CPU core; stop it at any time, run it again to go on.

Without a checkpoint in the output folder it begins from the weights inside the package, if there are any.

python examples/train_tiny_vlm.py --seconds 480 3600 --output runs/tiny-vlm

The two budgets are CPU seconds with patches of 16 pixels (64 image tokens) and of 8 (256). One sequence holds an
image, its caption and several questions, none of which sees another. While training, linear layers also say what
each patch shows and, half-way through the tower, its outline and where in its object it lies; they teach the tower to
see before the language model has learnt to ask (without them shapes stay guesses), and are thrown away. Small patches
begin with steps in which the language model reads one image in four, for it is the tower that has to learn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Stage, Trainer, parsed
from transformers import LlavaForConditionalGeneration
from vlm_data import OUTLINE, SHOWN, Packed, centres, drawn, images, outlines, pack, training_set, turns

from gen_turbo.pipelines import tiny_vlm

STAGES = (
    Stage("64", 16, batch=32, learning_rate=2e-3, decay_from=1.0),
    Stage("256", 8, batch=16, learning_rate=2e-3, decay_from=0.5),
)
QUESTIONS = 6
PAIRS = 2.5
"""How much oftener an image of two objects is taken than one of one; those are learnt first."""
SEEING_UNTIL = 0.45
HELD_OUT = 96


def see(model: LlavaForConditionalGeneration, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the tower makes of the patches of images (B, 3, 128, 128), half-way and at its end: (B, N, C) each."""
    states = model.model.vision_tower(images.float() / 127.5 - 1, output_hidden_states=True).hidden_states
    return states[len(states) // 2][:, 1:], states[-1][:, 1:]


def read(model: LlavaForConditionalGeneration, seen: Tensor, packed: Packed) -> Tensor:
    """What the language model makes of each token after it read the patches (B, N, C): (B, L, C)."""
    embeds = model.get_input_embeddings()(packed.ids)
    embeds = torch.cat([embeds[:, :1], model.model.multi_modal_projector(seen), embeds[:, 1 + seen.shape[1] :]], 1)
    return model.model.language_model(
        inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, patch: int, count: int) -> dict[str, float]:
    """Percentage of held-out turns whose every word is the likeliest one, which is what greedy decoding says."""
    rows, right = drawn(count, seed=1, held_out=True), defaultdict(list)
    for start in range(0, count, 16):
        part = rows[start : start + 16]
        asked = [turns(row, seed) for seed, row in enumerate(part, start)]
        packed = pack(asked, (tiny_vlm.SIZE_PX // patch) ** 2)
        said = model.lm_head(read(model, see(model, images(part)[0])[1], packed)).argmax(-1)
        is_wrong = (said != packed.target) & (packed.target >= 0)
        for kinds, wrong, turn in zip(asked, is_wrong, packed.turn, strict=True):
            for number, (_, _, kind) in enumerate(kinds, 1):
                right[kind].append(not wrong[turn == number].any())
    return {kind: round(100 * sum(values) / len(values), 1) for kind, values in sorted(right.items())}


class VlmTraining:
    """The model, what is lost on a batch, and how it becomes a checkpoint of transformers."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.trainer = Trainer(folder, rank, ("embeddings", "embed_tokens", "shown", "outline"))
        if not self.trainer.resume(self.make):
            self.begin()

    def make(self, patch: int) -> list[nn.Module]:
        """Fresh models with patches of this size: the one that is wanted, and layers that name what the tower sees."""
        model = tiny_vlm.make_model(patch)
        width = model.config.vision_config.hidden_size
        return [
            model,
            nn.ModuleDict({"shown": nn.Linear(width, len(SHOWN)), "outline": nn.Linear(width, OUTLINE**2 + 4)}),
        ]

    def begin(self) -> None:
        """Begins from the weights inside the package, if there are any."""
        folder, patch = tiny_vlm.weights_folder(), STAGES[0].size
        models = self.make(patch)
        if (folder / "config.json").exists():
            patch = tiny_vlm.PATCH_PX
            models[0] = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            print("begun from the shipped weights", flush=True)
        self.trainer.use(models, patch)

    def run(self, stage: Stage, seconds: float, data: tuple[Sequence, Tensor, Tensor]) -> None:
        """Trains one stage, after halving the patches if the stage needs it."""
        trainer = self.trainer
        if trainer.spent.get(stage.name, 0.0) >= seconds or trainer.size < stage.size:
            return
        if trainer.size > stage.size:
            self.refine(stage.size)

        def loss(batch: int, done: float) -> Tensor:
            is_seeing = stage.size == tiny_vlm.PATCH_PX and done < SEEING_UNTIL
            return self.loss(*data, batch, told=max(1, batch // 4) if is_seeing else batch)

        trainer.fit(stage, seconds, loss, self.export)

    def refine(self, patch: int) -> None:
        """Goes on with the averaged weights and smaller patches."""
        fine = self.make(patch)
        with torch.no_grad(), self.trainer.averaged():
            tiny_vlm.refine(self.trainer.models[0], fine[0])
            fine[1].load_state_dict(self.trainer.models[1].state_dict())
        self.trainer.use(fine, patch)

    def loss(self, rows: Sequence, images: Tensor, shown: Tensor, batch: int, told: int) -> Tensor:
        """How wrong the tower is about patches, and the language model about the first `told` images."""
        model = self.trainer.models[0]
        weights = torch.tensor([1.0 if " on the " in row.caption else PAIRS for row in rows])
        chosen = weights.multinomial(batch, replacement=True)
        half, seen = see(model, images[chosen])
        patches = self.patch_loss(half, seen, images[chosen], shown[chosen])
        seeds = torch.randint(0, 2**31, (told,)).tolist()
        asked = [turns(rows[i], seed, QUESTIONS) for i, seed in zip(chosen[:told].tolist(), seeds, strict=True)]
        packed = pack(asked, seen.shape[1])
        is_answer = packed.target >= 0
        said = model.lm_head(read(model, seen[:told], packed)[is_answer])
        answers = F.cross_entropy(said, packed.target[is_answer])
        self.last = (answers.item(), *(part.item() for part in patches))
        return answers + sum(patches)

    def patch_loss(self, half: Tensor, seen: Tensor, images: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What patches show, read at the tower's end; their outlines and places in objects, read half-way."""
        labels, side = self.trainer.models[1], tiny_vlm.SIZE_PX // self.trainer.size
        pooled = F.max_pool2d(shown.float(), shown.shape[-1] // side)
        told, (place, is_object) = labels["outline"](half), centres(pooled)
        outline = F.mse_loss(told[..., :-4], outlines(images, side))
        centre = F.mse_loss(told[..., -4:][is_object], place[is_object])
        wanted = pooled.flatten(2).transpose(1, 2)
        named = F.binary_cross_entropy_with_logits(labels["shown"](seen), wanted)
        return len(SHOWN) * named, 10 * outline, 10 * centre

    def export(self) -> None:
        """Writes the averaged weights and the processor as transformers would, and says how good they are."""
        model = self.trainer.models[0]
        with self.trainer.averaged():
            model.save_pretrained(self.folder / "model")
            print(self.trainer.steps, self.last, accuracy(model, self.trainer.size, HELD_OUT), flush=True)
        tiny_vlm.make_processor(self.trainer.size).save_pretrained(self.folder / "model")


def ship(folder: Path) -> None:
    """Puts the averaged weights into the package, in half precision, with the processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float16)
    if model.config.vision_config.patch_size != tiny_vlm.PATCH_PX:
        raise SystemExit(f"the training has not reached patches of {tiny_vlm.PATCH_PX} pixels yet; let it go on")
    model.save_pretrained(tiny_vlm.weights_folder())
    tiny_vlm.make_processor().save_pretrained(tiny_vlm.weights_folder())


def main() -> None:
    """Runs every stage whose budget is not spent."""
    arguments = parsed(__doc__.splitlines()[0], [480, 3600], Path("runs/tiny-vlm"))
    if arguments.ship:
        ship(arguments.output)
        return
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed + 100 * arguments.rank)
    data = training_set(arguments.output, arguments.scenes, arguments.seed)
    training = VlmTraining(arguments.output, arguments.rank)
    for stage, seconds in zip(STAGES, arguments.seconds, strict=True):
        training.run(stage, seconds, data)


if __name__ == "__main__":
    main()
