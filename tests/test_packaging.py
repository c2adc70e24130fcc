"""What a user gets who installs the package instead of checking it out."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("gen_turbo", "pipelines", "configs", "pyproject.toml", "README.md", "LICENSE")
MOST_WHEEL_BYTES, MOST_SOURCE_BYTES = 45_000_000, 42_000_000
PROBE = "pipelines/weights/probe/unet/model.safetensors"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline by way of the sdist, from a copy: a build leaves folders in the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(path, source / name)
    (source / PROBE).parent.mkdir(parents=True, exist_ok=True)
    (source / PROBE).touch()
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    _check_run([sys.executable, "-c", build, str(target)], source)
    sdist = next(target.glob("*.tar.gz"))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(target)]
    _check_run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], target)
    return next(target.glob("*.whl"))


def _check_run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def files(wheel) -> set[str]:
    """The names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _names(folder: str, pattern: str) -> set[str]:
    prefix = "" if folder == "gen_turbo" else "gen_turbo/"
    return {prefix + str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern) if path.is_file()}


def test_wheel_holds_all_code(files):
    """Catches a subpackage that pyproject.toml does not list."""
    code = _names("gen_turbo", "**/*.py") | _names("pipelines", "**/*.py") | _names("configs", "**/*.py")
    assert code <= files
    assert "gen_turbo/py.typed" in files


def test_wheel_holds_settings_and_weights(files):
    """Catches data that only an editable install finds."""
    data = _names("configs", "**/*.yaml") | _names("pipelines", "weights/**/*")
    assert data | {f"gen_turbo/{PROBE}"} <= files
    assert not [name for name in files if name.startswith("gen_turbo/bench/records/")]


def test_wheel_adds_no_other_top_level_name(files):
    """Catches a package called `pipelines` or `tests` in the user's environment."""
    assert {name.split("/")[0].split("-")[0] for name in files} == {"gen_turbo"}


def test_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    """Catches code that finds its files only in the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import gen_turbo; assert gen_turbo.__file__.startswith(sys.argv[1]), gen_turbo.__file__\n"
        "from gen_turbo.config import config_files, load_config\n"
        "print(sorted(config_files('pipeline')), load_config('tiny').checkpoint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['caption', 'caption-generate', 'sd15', 'sdxl', 'tiny', 'tiny-dit'] embedded:tiny"


def test_plugins_are_found():
    """Catches an entry point that was renamed without the factory."""
    assert "gen_turbo.pipelines" in {plugin.value for plugin in entry_points(group="gen_turbo.plugins")}


def test_sizes_stay_small(wheel):
    """Catches a package that grows beyond what one downloads without a thought, and records inside of the wheel."""
    assert wheel.stat().st_size < MOST_WHEEL_BYTES
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    sizes = [path.stat().st_size for name in tracked.stdout.splitlines() if (path := ROOT / name).is_file()]
    assert sum(sizes) < MOST_SOURCE_BYTES


def test_top_level_holds_the_agreed_names_only():
    """Catches stray files at the top of the repository."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    agreed = {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs",
        "mkdocs.yml",
        "gen_turbo",
        "pipelines",
        "configs",
        "tests",
        "examples",
        "Makefile",
        "LICENSE",
    }
    assert {name for name in top if not name.startswith(".")} <= agreed


def test_constraints_pin_what_the_project_asks_for():
    """Catches a pin outside the range that pyproject.toml promises to work."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    asked = {item.name.lower(): item for item in map(Requirement, [*project["dependencies"], *extras])}
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for name, version in pins.items():
        assert name not in asked or asked[name].specifier.contains(version), name
