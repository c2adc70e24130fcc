"""The shape of the package: who may import whom, what an import does, what the wheel lists."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import gen_turbo
from gen_turbo.registry import METHODS, Registry

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("tokens", "kernels", "registry", "schemas", "config", "scenes"),
    ("method", "metrics", "output", "overlay", "inputs", "manifest", "lines", "database"),
    ("engine", "models", "vlm", "api", "training"),
    ("methods",),
    ("pipelines",),
    ("factory",),
    ("bench", "commands"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HOST_LIBRARIES = {"diffusers", "transformers", "accelerate"}
MOST_LINES = 300


def _sources() -> list[Path]:
    return sorted([*ROOT.glob("gen_turbo/**/*.py"), *ROOT.glob("pipelines/**/*.py")])


def _layer(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "pipelines" else parts[1]


def _imports(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "gen_turbo")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    """Catches a lower layer that reaches up, such as a host that imports a method."""
    if path == ROOT / "gen_turbo" / "__init__.py":
        return
    rank = RANK[_layer(path)]
    above = [
        name
        for name in _imports(path)
        if name.startswith("gen_turbo.") and RANK.get(name.split(".")[1], 0) > rank and name.split(".")[1] in RANK
    ]
    assert not above


def test_the_library_never_imports_pipelines():
    """Catches a factory that names one pipeline's module instead of looking it up."""
    hits = [path for path in _sources() if path.is_relative_to(ROOT / "gen_turbo") for name in _imports(path)
            if name.startswith(("gen_turbo.pipelines", "pipelines"))]  # fmt: skip
    assert not hits


def test_tokens_need_torch_alone():
    """Catches a convenience import that ties the tensor functions to a host library."""
    allowed = {"torch", "gen_turbo", *sys.stdlib_module_names}
    for path in (ROOT / "gen_turbo" / "tokens").glob("*.py"):
        assert {name.split(".")[0] for name in _imports(path)} <= allowed, path


def test_host_libraries_stay_out_of_methods_and_below():
    """Catches a method that knows a host."""
    free = {
        "tokens",
        "registry",
        "schemas",
        "config",
        "scenes",
        "method",
        "metrics",
        "output",
        "inputs",
        "methods",
        "training",
    }
    for path in _sources():
        if _layer(path) in free:
            assert not {name.split(".")[0] for name in _imports(path)} & HOST_LIBRARIES, path


def test_import_is_light():
    """Catches a top-level import that makes `import gen_turbo` load the seconds of diffusers and transformers."""
    code = (
        "import sys, gen_turbo, gen_turbo.config, gen_turbo.commands.cli, gen_turbo.tokens.token_map\n"
        "import gen_turbo.scenes\n"
        "print(sorted({'diffusers', 'transformers', 'pipelines'} & set(sys.modules)))"
    )
    assert _run(code) == "[]"


def test_processors_add_two_names_and_change_no_class():
    """Catches a patch of a diffusers or transformers class at import."""
    code = """
import sys
import transformers, diffusers
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models import attention_processor
from transformers import CLIPTextModel
def classes():
    modules = [m for n, m in sorted(sys.modules.items()) if n.split('.')[0] in ('diffusers', 'transformers')]
    found = {v for m in modules for v in list(vars(m).values()) if isinstance(v, type)}
    return {c: dict(vars(c)) for c in found if c.__module__.split('.')[0] in ('diffusers', 'transformers')}
before = classes()
from gen_turbo import IdentityProcessor, RandomProcessor, ToMeProcessor, TurboProcessor
after = classes()
changed = {
    (c.__name__, n) for c in before for n in {*before[c], *after[c]} if before[c].get(n) is not after[c].get(n)
}
print(sorted(changed))
"""
    added = ["reset_attn_processor", "set_attn_processor"]
    assert _run(code).splitlines()[-1] == str([("DiffusionPipeline", name) for name in added])


def test_packages_are_the_folders():
    """Catches a folder that works in the checkout and is missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("gen_turbo/**/__init__.py")}
    assert sorted(listed) == sorted(folders | {"gen_turbo.pipelines", "gen_turbo.configs"})
    with_code = {path.parent for path in ROOT.glob("gen_turbo/**/*.py")}
    assert with_code == {path.parent for path in ROOT.glob("gen_turbo/**/__init__.py")}


def test_one_method_per_file():
    """Catches a method that hides in another's file or under another name."""
    import_module("gen_turbo.methods")
    files = {path.stem for path in (ROOT / "gen_turbo" / "methods").glob("*.py")} - {"__init__", "base"}
    homes = {name: METHODS[name].__module__.rpartition(".")[2] for name in METHODS.names()}
    assert homes == {name: name for name in files}


def test_public_names_are_no_submodules():
    """Catches a submodule that replaces a public function of the same name once it is imported."""
    modules = {path.stem for path in (ROOT / "gen_turbo").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(gen_turbo.__all__)


def test_every_public_name_exists():
    """Catches a lazy attribute that points nowhere."""
    for name in gen_turbo.__all__:
        assert getattr(gen_turbo, name) is not None


def test_pipelines_are_imported_inside_the_package():
    """Catches a test or module that imports the folder by accident, which no installed user can."""
    import_module("gen_turbo.pipelines")
    assert "pipelines" not in sys.modules


def test_sources_are_short_and_ascii():
    """Catches files that grow beyond reading, and characters that terminals and editors show differently."""
    for path in [
        *_sources(),
        *ROOT.glob("examples/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("configs/**/*.yaml"),
    ]:
        text = path.read_bytes()
        assert text.isascii(), path
        assert path.is_relative_to(ROOT / "tests") or text.count(b"\n") <= MOST_LINES, path


def test_registry_refuses_a_taken_name():
    """Catches a registry in which the last import wins."""
    registry: Registry[type] = Registry("thing")
    registry.register("a")(int)
    with pytest.raises(ValueError, match=r"builtins\.int registered it before builtins\.str"):
        registry.register("a")(str)
    assert registry["a"] is int


def test_registry_names_what_it_knows():
    """Catches a bare KeyError that leaves the user guessing."""
    registry: Registry[type] = Registry("thing")
    registry.register("b")(int)
    registry.register("a")(str)
    with pytest.raises(KeyError, match="unknown thing 'c'; known: a, b"):
        registry["c"]
