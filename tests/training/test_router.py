"""The router by itself: what it sees, what it costs, and the file that it lives in."""

from __future__ import annotations

import pytest
import torch

from gen_turbo.training.choosers import RandomChooser, Trained, UniformChooser
from gen_turbo.training.layouts import Layout, PromptCost, candidates
from gen_turbo.training.router import Router, RouterShape
from gen_turbo.vlm.routes import Prompt

WIDTH, DEPTH = 24, 5


def prompt_of(lengths: tuple[int, ...] = (12, 9), seed: int = 0) -> Prompt:
    """Prompts padded on the left, whose columns 3 to 7 behind the padding are image tokens."""
    generator = torch.Generator().manual_seed(seed)
    most = max(lengths)
    embeds = torch.randn(len(lengths), most, WIDTH, generator=generator)
    place = torch.arange(most)[None] - (most - torch.tensor(lengths))[:, None]
    return Prompt(embeds, (place >= 3) & (place < 8), place >= 0)


def router(**settings) -> Router:
    """A router whose scores differ well."""
    torch.manual_seed(0)
    made = Router(RouterShape(WIDTH, DEPTH, width=16, num_heads=2, **settings)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3.0)
        made.head.weight.normal_()
    return made


@pytest.mark.parametrize("attention", ["full", "causal"])
@torch.no_grad()
def test_padding_changes_no_score(attention):
    """Catches positions counted from the padding, and padding that is seen."""
    made, both = router(attention=attention, depth=2), prompt_of()
    scores = made(both)
    alone = made(Prompt(both.embeds_BLC[1:, 3:], both.is_image_BL[1:, 3:], both.real_BL[1:, 3:]))
    assert (scores.token_BL[1, 3:] - alone.token_BL[0]).abs().max() < 1e-5
    assert (scores.layer_BD[1] - alone.layer_BD[0]).abs().max() < 1e-5


@torch.no_grad()
def test_only_full_attention_sees_the_question():
    """Catches a causal mask in the default router, whose image tokens would never see what is asked."""
    first, second = prompt_of((12,)), prompt_of((12,))
    second.embeds_BLC[:, 9:] += 1.0
    for attention, differs in (("full", True), ("causal", False)):
        made = router(attention=attention)
        a, b = made(first), made(second)
        assert bool((a.token_BL[:, 3:8] != b.token_BL[:, 3:8]).any()) is differs
        assert bool((a.layer_BD != b.layer_BD).any())


@torch.no_grad()
def test_noise_is_drawn_only_when_asked():
    """Catches a router that chooses differently for the same prompt outside of training."""
    made, prompt = router(), prompt_of()
    before = torch.get_rng_state()
    assert torch.equal(made(prompt).token_BL, made(prompt).token_BL)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(made(prompt, noise=1.0).token_BL, made(prompt, noise=1.0).token_BL)


@torch.no_grad()
def test_equal_scores_keep_tokens_everywhere():
    """Catches an untrained router that keeps the top of the image, and scores that noise drowns."""
    made, prompt = Router(RouterShape(WIDTH, DEPTH, width=16, num_heads=2)), prompt_of((400,))
    prompt.is_image_BL[:] = True
    kept = made.choose(prompt).token_BL[0].topk(100).indices
    assert all(15 <= int(((kept >= start) & (kept < start + 100)).sum()) <= 35 for start in range(0, 400, 100))
    assert torch.equal(made.choose(prompt).token_BL, made.choose(prompt).token_BL)
    plain = Router(RouterShape(WIDTH, DEPTH, width=16, num_heads=2, dither=0.0))
    assert torch.equal(plain.choose(prompt).token_BL, plain(prompt).token_BL)


def test_everything_learns():
    """Catches weights that no score depends on."""
    made = router()
    scores = made(prompt_of())
    (scores.token_BL.square().sum() + scores.layer_BD.square().sum()).backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in made.parameters())


@torch.no_grad()
def test_flops_are_those_of_its_products():
    """Catches a cost that forgets attention, layer tokens or a projection."""
    from torch.utils.flop_counter import FlopCounterMode

    made, prompt = router(depth=2), prompt_of((12, 12))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        made(prompt)
    assert made.flops(2, 12) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"attention": "left"}, "attention must be one of full, causal"), ({"num_heads": 3}, "multiple of twice")],
)
def test_wrong_sizes_are_refused(settings, words):
    """Catches heads that rotary positions cannot split."""
    with pytest.raises(ValueError, match=words):
        RouterShape(WIDTH, DEPTH, width=16, **settings)


def test_controls_keep_even_and_random_places():
    """Catches a control that looks at the prompt, or bunches what it keeps."""
    prompt = prompt_of((40,))
    prompt.is_image_BL[:] = True
    place = UniformChooser(8)(prompt).token_BL[0].topk(10).indices.sort().values
    assert int(place.diff().max()) <= 6 and int(place.diff().min()) >= 2
    one, two = (RandomChooser(8, seed)(prompt) for seed in (0, 1))
    assert not torch.equal(one.token_BL, two.token_BL)
    assert torch.equal(one.token_BL, RandomChooser(8, 0)(prompt).token_BL)


def test_a_trained_router_needs_no_gradient():
    """Catches graphs that grow in the hands of users."""
    assert not Trained(router())(prompt_of()).token_BL.requires_grad


COST = PromptCost(num_layers=8, weights=1000, width=10, length=300, image_tokens=256)


def test_shares_follow_from_layers_and_tokens():
    """Catches layers before the cut counted as shortened, and attention forgotten."""
    assert COST.share(Layout(1.0, 8, 2)) == 1.0
    assert COST.share(Layout(1.0, 6, 2)) == 0.75
    full, short = 300 * 1000 + 2 * 300**2 * 10, 172 * 1000 + 2 * 172**2 * 10
    assert COST.share(Layout(0.5, 7, 2)) == pytest.approx((2 * full + 5 * short) / (8 * full))


@pytest.mark.parametrize("budget", [0.35, 0.6, 0.93])
def test_layouts_spend_the_budget_and_no_more(budget):
    """Catches a budget that is exceeded, or left half unspent."""
    found = candidates(COST, budget, (0, 2))
    assert found
    for layout in found:
        more = Layout(min(1.0, layout.tokens + 1 / 256), layout.layers, layout.first)
        assert COST.share(layout) <= budget
        assert layout.tokens == 1.0 or COST.share(more) > budget
    assert COST.fit(0.05, 8, 2) is None
