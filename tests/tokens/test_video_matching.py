"""Matching over the frames of a video: against loops, and by what it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.random import RandomProcessor
from gen_turbo.methods.turbo import TurboProcessor
from gen_turbo.tokens.video import video_soft_matching

T, GRID = 4, (5, 6)
N = GRID[0] * GRID[1]


def cosine(x, y):
    """Cosine of two tokens."""
    return float(F.normalize(x, dim=-1) @ F.normalize(y, dim=-1))


def slow_destinations(x, num_removed, tile, penalty):
    """Where every token of one video goes, by loops over frames, places and links."""
    best, target = {}, {}
    for token in range(T * N):
        frame, place = divmod(token, N)
        row, column = divmod(place, GRID[1])
        choices = [] if frame == 0 else [(cosine(x[token], x[token - N]), token - N)]
        if row % 2 or column % 2:
            for other in range(N):
                there = divmod(other, GRID[1])
                is_corner = not (there[0] % 2 or there[1] % 2)
                if is_corner and (there[0] // tile, there[1] // tile) == (row // tile, column // tile):
                    choices.append((cosine(x[token], x[frame * N + other]), frame * N + other))
        if choices:
            value, target[token] = max(choices)
            best[token] = value - float(penalty[token])
    leaving = sorted(best, key=best.get, reverse=True)[:num_removed]
    goes = {token: target[token] if token in leaving else token for token in range(T * N)}

    def end(token):
        return token if goes[token] == token else end(goes[token])

    return [end(token) for token in range(T * N)]


def moving(seed=0):
    """A patch of 2 x 2 tokens that moves one place a frame over a background that stays; and where it changes."""
    generator = torch.Generator().manual_seed(seed)
    background = torch.randn(N, 16, generator=generator)
    patch = torch.randn(4, 16, generator=generator)
    frames, covered = [], []
    for frame in range(T):
        places = [(1 + y) * GRID[1] + frame + x for y in (0, 1) for x in (0, 1)]
        one = background.clone()
        one[places] = patch
        frames.append(one + 1e-3 * torch.randn(N, 16, generator=generator))
        covered.append(set(places))
    changed = {frame * N + p for frame in range(1, T) for p in covered[frame] | covered[frame - 1]}
    return torch.cat(frames)[None], changed


@pytest.mark.parametrize("num_removed", [1, 30, 80, T * N - 9])
@pytest.mark.parametrize("tile", [2, 4])
def test_chains_end_where_loops_end(num_removed, tile):
    """Catches links across places, chains that stop at a token that left, and a budget of each frame."""
    x = torch.randn(2, T * N, 8, generator=torch.Generator().manual_seed(num_removed), dtype=torch.float64)
    penalty = torch.rand(2, T * N, dtype=torch.float64) * 0.1
    plan = video_soft_matching(x, T, GRID, num_removed, tile, penalty_BL=penalty)
    assert plan.num_slots == T * N - num_removed
    for row in range(2):
        ends = plan.anchor_BM[row][plan.slot_BN[row]].tolist()
        assert ends == slow_destinations(x[row], num_removed, tile, penalty[row])


def test_what_moves_stays_and_random_loses_it():
    """Catches tokens that leave in space while a place does not change in time; random keeps what it happens to."""
    x, changed = moving()
    ratio = 1 - (N + len(changed)) / (T * N)
    site = LayerInfo("pre_llm", ratio, GRID, num_frames=T)
    wanted = set(range(N)) | changed
    kept = set(TurboProcessor(ratio).plan(x, site, StepInfo()).anchor_BM[0].tolist())
    chance = set(RandomProcessor(ratio).plan(x, site, StepInfo()).anchor_BM[0].tolist())
    assert len(kept) == len(chance) == len(wanted)
    assert kept == wanted and len(chance & wanted) < 0.8 * len(wanted)


def test_a_place_is_merged_into_its_first_frame_and_no_number_merges_last():
    """Catches anchors in later frames, means of other places, and NaN that is taken for similar."""
    frame = torch.randn(1, N, 8, generator=torch.Generator().manual_seed(1))
    still = frame.repeat(1, T, 1)
    plan = video_soft_matching(still, T, GRID, (T - 1) * N)
    assert plan.anchor_BM[0].tolist() == list(range(N))
    assert torch.allclose(plan.merge(still), frame, atol=1e-6)
    still[0, 2 * N + 7] = float("nan")
    plan = video_soft_matching(still, T, GRID, (T - 2) * N)
    assert 2 * N + 7 in plan.anchor_BM[0].tolist()


def test_what_does_not_fit_is_told():
    """Catches frames of another size and more tokens than can leave, in words of torch's."""
    x = torch.randn(1, T * N, 8)
    with pytest.raises(ValueError, match="3 frames of 5 x 6 tokens are not 120 tokens"):
        video_soft_matching(x, 3, GRID, 4)
    with pytest.raises(ValueError, match="cannot remove 112 of 120 tokens of a video: 111 can leave"):
        video_soft_matching(x, T, GRID, 112)
    assert video_soft_matching(x, T, GRID, 0).is_identity
    site = LayerInfo("pre_llm", 0.9, GRID, num_frames=T)
    assert TurboProcessor(0.9).max_ratio_at(site) == 1 - 9 / 120 and TurboProcessor(0.9).max_ratio == 0.75


def test_turbo_passes_its_settings_on():
    """Catches other tiles than those of the settings, penalties left out, and fewer tokens than a video can lose."""
    grid, frames = (12, 14), 2
    x = torch.randn(1, frames * 168, 6, generator=torch.Generator().manual_seed(3))
    value = torch.rand(1, frames * 168, generator=torch.Generator().manual_seed(4))
    penalty = 0.5 * value / value.mean()
    count = int(336 * 0.8)
    for tile, side in [(8, 4), (0, 14), (2, 2)]:
        method = TurboProcessor(0.8, tile=tile, value_weight=0.5)
        site = LayerInfo("pre_llm", 0.8, grid, {"self": value}.get, num_frames=frames)
        expected = video_soft_matching(x, frames, grid, count, side, (2, 2), penalty)
        plan = method.plan(x, site, StepInfo(num_plans=1))
        assert torch.equal(plan.slot_BN, expected.slot_BN) and torch.equal(plan.anchor_BM, expected.anchor_BM)
    plain, told = (video_soft_matching(x, frames, grid, 99, *tile) for tile in [(), (8, (2, 2), None)])
    assert torch.equal(plain.slot_BN, told.slot_BN)
    one, line = LayerInfo("x", 0.5, (7, 9), num_frames=1), LayerInfo("x", 0.5, num_frames=3)
    assert TurboProcessor().max_ratio_at(one) == TurboProcessor().max_ratio_at(line) == 0.75
    assert TurboProcessor().max_ratio_at(LayerInfo("x", 0.5, (7, 9), num_frames=3)) == 1 - 20 / 189
    flat = TurboProcessor(0.5).plan(x[:, :64], LayerInfo("x", 0.5, num_frames=2), StepInfo())
    assert torch.equal(flat.slot_BN, TurboProcessor(0.5).plan(x[:, :64], LayerInfo("x", 0.5), StepInfo()).slot_BN)


def test_the_same_token_in_time_goes_before_its_like_in_space():
    """Catches a still token that rounding sends to a neighbour, and one that the last frame lends to the first."""
    frame = torch.ones(1, N, 3) + 1e-4 * torch.rand(1, N, 3, generator=torch.Generator().manual_seed(0))
    plan = video_soft_matching(frame.repeat(1, T, 1), T, GRID, (T - 1) * N)
    own = plan.anchor_BM.gather(1, plan.slot_BN)[0].tolist()
    left = [token for token in range(N, T * N) if own[token] != token]
    assert len(left) > N and all(own[token] == own[token - N] for token in left)


def test_all_but_the_first_frames_destinations_can_leave_an_odd_grid():
    """Catches a limit that rounds an odd side down, or counts destinations of later frames."""
    first = [row * GRID[1] + column for row in range(0, GRID[0], 2) for column in range(0, GRID[1], 2)]
    x = torch.randn(1, T * N, 16, generator=torch.Generator().manual_seed(0))
    most = T * N - len(first)
    assert video_soft_matching(x, T, GRID, most).anchor_BM[0].tolist() == first
    with pytest.raises(ValueError, match=f"cannot remove {most + 1} of {T * N} tokens of a video: {most} can leave"):
        video_soft_matching(x, T, GRID, most + 1)
    site = LayerInfo("pre_llm", 0.5, GRID, num_frames=T)
    assert TurboProcessor(0.5).max_ratio_at(site) == 1 - len(first) / (T * N)


def test_what_is_no_number_leaves_last():
    """Catches NaN taken for a cosine of zero, which is more than that of opposite tokens."""
    x = torch.randn(1, 2 * N, 16, generator=torch.Generator().manual_seed(1))
    x[0, N:] = -x[0, :N]
    x[0, N] = float("nan")
    kept = video_soft_matching(x, 2, GRID, 2 * N - 9 - 1).anchor_BM[0].tolist()
    assert N in kept
