"""The grouping layer of VisToG alone: hard groups, gradients through them, empty groups, files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gen_turbo.tokens.select import pool_cells
from gen_turbo.training.probe import is_same_model, weight_probe
from gen_turbo.training.vistog import SemanticGrouping, VisToGArtefact, VisToGShape

GRID, WIDTH, NUM = (6, 6), 8, 7


def trained(num_groups: int = NUM, seed: int = 0) -> SemanticGrouping:
    """A layer whose learned parts are far from their start."""
    grouping = SemanticGrouping(VisToGShape(num_groups, WIDTH)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in grouping.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))
        grouping.log_locality.fill_(-3.0)
    return grouping


def tokens(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Semantic tokens and patches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, NUM, WIDTH, generator=generator), torch.randn(batch, 36, WIDTH, generator=generator)


@pytest.mark.parametrize("num_groups", [1, 7, 16, 35, 36])
def test_the_start_is_pooling(num_groups):
    """Catches learned parts that do not begin at zero, and a distance that lets a patch leave its cell."""
    grouping, patches = SemanticGrouping(VisToGShape(num_groups, WIDTH)).eval(), tokens()[1]
    cells = pool_cells(GRID, num_groups)
    groups = grouping.enter(patches, GRID)
    assert torch.equal(groups, cells.merge(patches))
    out, slots = grouping(groups, patches, GRID)
    assert (out - cells.merge(patches)).abs().max() < 1e-6
    assert torch.equal(slots, cells.slot_BN.expand(2, -1))


@torch.no_grad()
def test_every_patch_is_in_the_one_group_it_resembles_most():
    """Catches a softmax over patches instead of groups, a soft mean in evaluation, and means over the wrong axis."""
    grouping, (groups, patches) = trained(), tokens()
    share = grouping.assign(groups, patches, GRID)
    out, slots = grouping(groups, patches, GRID)
    assert torch.equal(share.sum(1), torch.ones(2, 36)) and set(share.unique().tolist()) == {0.0, 1.0}
    assert len(slots.unique()) > 2
    weight = float(grouping.log_locality.exp())
    place = [(patch // 6, patch % 6) for patch in range(36)]
    cell = pool_cells(GRID, NUM).slot_BN[0].tolist()
    for row in range(2):
        query, key = grouping.query(grouping.norm_group(groups[row])), grouping.key(grouping.norm_patch(patches[row]))
        for patch, (y, x) in enumerate(place):
            scores = []
            for group in range(NUM):
                near = min((y - v) ** 2 + (x - u) ** 2 for (v, u), c in zip(place, cell, strict=True) if c == group)
                scores.append(float(query[group] @ key[patch]) / WIDTH**0.5 - weight * near)
            assert slots[row, patch] == max(range(NUM), key=lambda group: scores[group])
        for group in range(NUM):
            members = patches[row, slots[row] == group]
            expected = groups[row, group]
            if len(members):
                mean = members.mean(0)
                mixed = mean + grouping.value(mean) + grouping.semantic(grouping.norm_group(groups[row, group]))
                expected = mixed + grouping.mlp(grouping.norm_mlp(mixed))
            assert (out[row, group] - expected).abs().max() < 1e-5


def test_an_empty_group_is_its_semantic_token():
    """Catches a division by nothing, and a learned part that turns an empty group into something else."""
    grouping, (groups, patches) = trained(), tokens()
    with torch.no_grad():
        grouping.query.weight.zero_()
        grouping.query.bias.zero_()
        grouping.log_locality.fill_(-torch.inf)
    out, slots = grouping(groups, patches, GRID)
    assert (slots == 0).all()
    assert torch.equal(out[:, 1:], groups[:, 1:]) and not torch.allclose(out[:, 0], groups[:, 0])
    grouping.train()
    groups.requires_grad_()
    grouping(groups, patches, GRID)[0].square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in grouping.parameters() if weight.grad is not None)


def test_gradients_pass_straight_through_the_hard_choice():
    """Catches an argmax that cuts the gradient, and a forward pass that is soft in training."""
    grouping, (groups, patches) = trained().train(), tokens()
    groups.requires_grad_()
    torch.manual_seed(0)
    share = grouping.assign(groups, patches, GRID)
    assert ((share - share.round()).abs() < 1e-6).all() and torch.allclose(share.sum(1), torch.ones(2, 36))
    torch.manual_seed(0)
    out, _ = grouping(groups, patches, GRID)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for name, weight in grouping.named_parameters():
        assert name == "tokens" or weight.grad.abs().max() > 0, name
    assert groups.grad.abs().max() > 0


def test_the_gradient_is_that_of_the_soft_choice():
    """Catches a surrogate other than the softmax over groups, such as one over patches."""
    grouping, (groups, patches) = trained().train(), tokens()
    grouping.zero_grad()
    torch.manual_seed(3)
    direction = torch.randn(2, NUM, 36)
    torch.manual_seed(0)
    (grouping.assign(groups, patches, GRID) * direction).sum().backward()
    found = grouping.query.weight.grad.clone()
    grouping.zero_grad()
    torch.manual_seed(0)
    noise = -(-torch.rand(2, NUM, 36).clamp(1e-6, 1 - 1e-6).log()).log()
    query, key = grouping.query(grouping.norm_group(groups)), grouping.key(grouping.norm_patch(patches))
    slot = pool_cells(GRID, NUM).slot_BN.view(GRID)
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    near = torch.stack(
        [((y[..., None] - y[slot == g]) ** 2 + (x[..., None] - x[slot == g]) ** 2).amin(-1) for g in range(NUM)]
    )
    logits = query @ key.transpose(1, 2) / WIDTH**0.5 - grouping.log_locality.exp() * near.flatten(1)
    ((logits + noise).softmax(1) * direction).sum().backward()
    assert torch.allclose(found, grouping.query.weight.grad, atol=1e-5)


def test_noise_is_for_training_alone():
    """Catches Gumbel noise at inference, and none in training."""
    grouping, (groups, patches) = trained(), tokens()
    state = torch.get_rng_state()
    first = grouping(groups, patches, GRID)
    assert torch.equal(torch.get_rng_state(), state)
    second = grouping(groups, patches, GRID)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    grouping.train()
    drawn = [grouping(groups, patches, GRID)[1] for _ in range(2)]
    assert not torch.equal(drawn[0], drawn[1])


def test_images_of_a_batch_do_not_meet():
    """Catches groups that are shared or normalised over the batch."""
    grouping, (groups, patches) = trained(), tokens(3)
    together, slots = grouping(groups, patches, GRID)
    for row in range(3):
        alone, slot = grouping(groups[row : row + 1], patches[row : row + 1], GRID)
        assert (alone[0] - together[row]).abs().max() < 1e-5 and torch.equal(slot[0], slots[row])
    assert not torch.equal(slots[0], slots[1])


def test_a_file_brings_back_the_same_layer(tmp_path):
    """Catches weights, shape, connector or notes that are lost on the way."""
    grouping, (groups, patches) = trained(), tokens()
    connector = {"linear_1.weight": torch.randn(3, 2)}
    path = tmp_path / "folder" / "a.safetensors"
    VisToGArtefact(grouping, connector, torch.arange(3.0), {"steps": "5"}).save(path)
    loaded = VisToGArtefact.load(path)
    assert torch.equal(loaded.grouping(groups, patches, GRID)[0], grouping(groups, patches, GRID)[0])
    assert loaded.grouping.shape == grouping.shape and loaded.notes == {"steps": "5"}
    assert torch.equal(loaded.connector["linear_1.weight"], connector["linear_1.weight"])
    assert torch.equal(loaded.probe, torch.arange(3.0)) and not loaded.grouping.training
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_other_files_are_refused(tmp_path):
    """Catches a traceback of the reader, and weights of something else that are taken."""
    text, other = tmp_path / "text.safetensors", tmp_path / "other.safetensors"
    text.write_text("not weights")
    save_file({"tokens": torch.zeros(1)}, other)
    for path, words in ((text, "cannot read"), (other, "no VisToG weights"), (tmp_path / "none", "cannot read")):
        with pytest.raises(ValueError, match=words):
            VisToGArtefact.load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_is_known_in_every_type_and_told_from_others(dtype):
    """Catches a probe that only equal bytes pass, and one that a fine-tuned copy passes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30))
    probe = weight_probe([model])
    assert is_same_model(probe, weight_probe([model.to(dtype)]))
    model = model.float()
    with torch.no_grad():
        model[0].weight += 0.01 * torch.randn(30, 40)
    assert not is_same_model(probe, weight_probe([model]))
    assert not is_same_model(probe, weight_probe([model[0]]))
