"""`gen-turbo tune`: what it searches, how near it comes to a whole grid, and that it can be stopped."""

from __future__ import annotations

import itertools
import sqlite3
import sqlite3.dbapi2

import pytest

from gen_turbo.commands.cli import main
from gen_turbo.commands.tune import EVERY, RATIOS, SCOPES, Target, search
from gen_turbo.config import ConfigError
from gen_turbo.factory import build_processor

LEVELS = [1, 2]


class Landscape:
    """Speed and fidelity that fall and rise as on the embedded models: more removed, copied and deeper is faster.

    Copying ruins images on a transformer, and on a UNet loses less than detail that has grown old.
    """

    def __init__(self, kind="between"):
        self.num_measured, self.of_copied = 0, {"between": 60, "transformer": 120, "unet": 15}[kind]

    def __call__(self, settings):
        self.num_measured += 1
        build_processor(dict(settings))
        share = 1 if settings["restore"] == "copy" else 1 - 1.4 / settings["full_every"]
        reach = (0.5 if settings["scope"] == "attention" else 0.8) * (1 if settings["max_downsample"] == 1 else 1.15)
        saved = share * reach * (1 - (1 - settings["ratio"]) ** 1.5)
        lost = saved * (1 + (settings["max_downsample"] == 2))
        lost *= 30 if settings["restore"] == "residual" else self.of_copied
        return {"speedup": 1 / (1 - 0.9 * saved), "psnr": 75 - lost, "check": 1 - lost / 200}


def grid():
    """Every setting that is searched."""
    every = [{"restore": "residual", "full_every": k} for k in EVERY] + [{"restore": "copy"}]
    for scope, ratio, level, more in itertools.product(SCOPES, RATIOS, LEVELS, every):
        yield {"method": "turbo", "scope": scope, "ratio": ratio, "max_downsample": level, **more}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("psnr>=55", "between"),
        ("speedup>=1.5", "between"),
        ("check>=0.9", "between"),
        ("psnr>=60", "unet"),
        ("psnr>=50", "transformer"),
    ],
)
def test_a_tenth_of_the_grid_comes_within_5_percent_of_its_best(text, kind, tmp_path):
    """Catches a search at random, one that stops at its first guesses, and one that reaches copying by rhythm alone."""
    target, landscape = Target.of(text), Landscape(kind)
    all_of_it = list(grid())
    best = max(target.goodness(landscape(settings)) for settings in all_of_it)
    landscape.num_measured = 0
    settings, measured = search(landscape, target, LEVELS, len(all_of_it) // 10, tmp_path / "a.db", "a", 0)
    assert landscape.num_measured <= len(all_of_it) // 10
    assert target.goodness(measured) >= 0.95 * best
    assert build_processor(settings).ratio in RATIOS


def test_a_search_that_was_stopped_goes_on(tmp_path):
    """Catches trials that are lost, or made again."""
    target, landscape = Target.of("psnr>=50"), Landscape()
    for trials in (4, 4, 7):
        search(landscape, target, LEVELS, trials, tmp_path / "a.db", "a", 0)
    assert landscape.num_measured <= 7
    settings, _ = search(landscape, target, LEVELS, 7, tmp_path / "a.db", "a", 0)
    assert landscape.num_measured <= 7 and settings["method"] == "turbo"


def is_open(connection):
    """Whether a connection to a database is open; a closed one refuses to be asked."""
    try:
        return connection.total_changes >= 0
    except sqlite3.ProgrammingError:
        return False


def test_a_search_closes_its_file(tmp_path, monkeypatch):
    """Catches connections left open, also by a search that fails; Python 3.13 warns of them."""
    made, connect = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **named: made.append(connect(*given, **named)) or made[-1])
    monkeypatch.setattr(sqlite3.dbapi2, "connect", sqlite3.connect)
    search(Landscape(), Target.of("psnr>=50"), LEVELS, 2, tmp_path / "a.db", "a", 0)
    with pytest.raises(ZeroDivisionError):
        search(lambda settings: 1 / 0, Target.of("psnr>=50"), LEVELS, 4, tmp_path / "a.db", "a", 0)
    assert made and not any(map(is_open, made))


@pytest.mark.parametrize("text", ["faster", "speedup>2", "psnr>=", "time>=1"])
def test_a_target_that_is_none_is_refused(text):
    """Catches a target that is taken for another."""
    with pytest.raises(ConfigError, match="--target must be speedup>=2, psnr>=35 or check"):
        Target.of(text)


def test_the_command_writes_what_loads(tmp_path, capsys):
    """Catches a YAML that no processor can be made of, and a result that hides what was lost."""
    path = tmp_path / "tuned.yaml"
    arguments = ["tune", "--target", "psnr>=20", "--trials", "1", "--images", "1", "--counted", "--output", str(path)]
    assert main([*arguments, "steps=4", "height=64", "width=64"]) in (0, None)
    processor = build_processor(str(path))
    assert processor.ratio == 0.4 and processor.scope == "attention"
    assert "times as fast as stock at" in capsys.readouterr().out
    assert path.read_text().startswith("# Tuned for tiny, psnr>=20: ")
    assert main([*arguments[:2], "speedup>=50", *arguments[3:], "steps=4", "height=64", "width=64"]) == 2
    assert "no trial reached speedup>=50; the nearest was" in capsys.readouterr().err
