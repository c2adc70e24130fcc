"""Routes and weights found without a model, on results that are made up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gen_turbo.training.route import RouteSearch, weights_of
from gen_turbo.training.schedule import by_branch


def curves(num_calls=16, size=40):
    """Results of a call that change smoothly, (T, size), and what a sampler makes of them."""
    time = np.linspace(0, 1, num_calls)[:, None]
    shape = np.random.default_rng(0)
    values = sum(shape.normal(size=(1, size)) * np.sin(time * freq + shape.normal()) for freq in (1.0, 2.0, 3.0, 5.0))
    return values, np.linspace(0.5, 1.5, num_calls)


def rough(values, effect):
    """The same with results that no earlier ones tell, the fewer the later."""
    count = len(effect)
    beside = np.random.default_rng(1).normal(size=(count, 6)) * np.linspace(0.3, 0.02, count)[:, None]
    return np.concatenate([values, beside], 1), effect


def made_by(weights, runs, parts, effect, narrow=()):
    """What the end is off by where each branch of a result, of parts (T, k, size), is made by its own weights."""
    num_branches, own = parts.shape[1], {}
    off = np.zeros(parts.shape[2])
    for call in range(len(effect)):
        if call in runs:
            own[call] = [parts[call, branch] for branch in range(num_branches)]
        known = list(reversed(own.values()))
        branches = by_branch(weights.get(call, ((1.0,),) * num_branches))
        if call in narrow:
            own[call][0] = sum(w * result[0] for w, result in zip(branches[0][1:], known[1:], strict=False))
            branches = ((1.0,), *branches[1:])
        made = [sum(w * r[b] for w, r in zip(own_w, known, strict=False)) for b, own_w in enumerate(branches)]
        off = off + effect[call] * (sum(made) - parts[call].sum(0))
    return float(off @ off)


def stock_weights(route, values, effect):
    """Weights fitted to results of stock alone, and the error that they leave."""
    stacked = np.stack([*values, *values[list(route.runs)]])
    weights, off = weights_of(route.runs, stacked @ stacked.T, effect, len(effect))
    return weights, float(off @ stacked @ stacked.T @ off)


def search_of(values, effect, felt=0.1):
    """A search over one run; by default the model hardly feels errors."""
    return RouteSearch(values @ values.T, effect, np.ones(len(effect)), felt)


def test_a_route_is_what_weights_make_of_it():
    """Catches weights that are laid over other results than those they were fitted to, a correction left out, and a
    search that counts another error than they leave.
    """
    values, effect = rough(*curves())
    # What the model feels between is no part of what the weights do.
    search = search_of(values, effect, 0.0)
    route = search.best(5)
    assert len(route.runs) == 5 and route.runs[0] == 0
    weights, left = stock_weights(route, values, effect)
    plain = {call: weight for call, weight in weights.items() if call not in route.runs}
    error = made_by(weights, route.runs, values[:, None], effect)
    assert error < 0.2 * made_by(plain, route.runs, values[:, None], effect)
    # Weights also undo what earlier gaps have left, which the search counts as lost.
    assert error == pytest.approx(left, rel=0.02) and 0.2 * route.error < error < route.error
    even = search.route([0, 3, 7, 11, 15])
    assert route.error < even.error


@pytest.mark.parametrize("is_to_end", [False, True])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_route_is_the_best_of_all_of_its_length(count, is_to_end):
    """Catches a search that ends in a neighbourhood, a gap priced without the runs before it, a last call moved."""
    search = search_of(*rough(*curves(11)))
    every = [search.route([0, *others]) for others in itertools.combinations(range(1, 11), count - 1)]
    every = [route for route in every if not is_to_end or route.runs[-1] == 10]
    least, best = min(route.error for route in every), search.best(count, is_to_end=is_to_end)
    far = 0.8 if is_to_end else 0.5
    assert best.error <= 1.02 * least < far * np.median([route.error for route in every])
    assert len(best.runs) == count and (best.runs[-1] == 10 or not is_to_end)


def test_fewer_calls_lose_more():
    """Catches a search that stops early or moves calls for the worse."""
    search = search_of(*curves())
    errors = [search.best(count).error for count in (12, 9, 6, 3)]
    assert errors == sorted(errors) and errors[0] < 1e-3 * errors[-1]


def feeling(values, effect, runs, weights, end):
    """What a model gives at the calls that run, that feels how far it was led astray, and how far that is at `end`."""
    mixing = np.random.default_rng(2).normal(size=(values.shape[1],) * 2) / values.shape[1]
    off, own = np.zeros(values.shape[1]), {}
    for call in range(end):
        if call in runs:
            own[call] = values[call] + (3 * off + 20 * mixing @ off) / np.abs(effect).sum()
        known = [own[run] for run in reversed(own)]
        off = off + effect[call] * (
            sum(w * k for w, k in zip(weights.get(call, (1.0,)), known, strict=False)) - values[call]
        )
    return own, float(off @ off)


def test_weights_fitted_to_own_runs_know_what_the_model_makes_of_errors():
    """Catches weights fitted to results of stock alone, to results of other calls, and errors before that are lost."""
    values, effect = rough(*curves())
    route = search_of(values, effect, 1.0).best(5)
    weights = {}
    for number, following in enumerate([*route.runs[1:], len(effect)]):
        own, _ = feeling(values, effect, route.runs, weights, route.runs[number] + 1)
        stacked = np.stack([*values, *own.values()])
        weights, off = weights_of(route.runs[: number + 1], stacked @ stacked.T, effect, following)
    fitted = feeling(values, effect, route.runs, weights, len(effect))[1]
    assert off @ stacked @ stacked.T @ off == pytest.approx(fitted, rel=1e-3)
    of_stock = stock_weights(route, values, effect)[0]
    assert fitted < 0.5 * feeling(values, effect, route.runs, of_stock, len(effect))[1]


def test_branches_have_weights_of_their_own():
    """Catches weights of one branch on the other, a forecast of a branch that later weights do not know of, and what a
    branch that is left out would have added.
    """
    values, effect = rough(*curves())
    # Not the same at any time, so that weights of one are wrong for the other.
    parts = np.stack([-2 * values, 3 * (0.4 * values[::-1] + 1.0)], 1)
    guided, runs, count = parts.sum(1), (0, 2, 5, 9, 13), len(effect)

    def products(own):
        stacked = np.stack([*guided, *own])
        return stacked @ stacked.T

    together, off = weights_of(runs, products(guided[list(runs)]), effect, count)
    apart, nearer = weights_of(runs, products(parts[list(runs)].reshape(10, -1)), effect, count, 2)
    errors = [made_by(together, runs, guided[:, None], effect), made_by(apart, runs, parts, effect)]
    assert errors[1] < 0.5 * errors[0] and {len(by_branch(w)) for w in apart.values()} == {2}
    assert errors == pytest.approx(
        [off @ products(guided[list(runs)]) @ off, nearer @ products(parts[list(runs)].reshape(10, -1)) @ nearer],
        rel=1e-2,
    )
    ran = np.concatenate([parts[list(runs[:-1])].reshape(8, -1), parts[runs[-1], 1:]])
    narrow, off = weights_of(runs, products(ran), effect, count, 2, runs[-1:])
    assert narrow[runs[-1]][0][0] == 0 and len(narrow[runs[-1]][0]) > 1
    error = made_by(narrow, runs, parts, effect, runs[-1:])
    assert error == pytest.approx(off @ products(ran) @ off, rel=1e-2)
    assert errors[1] < error
