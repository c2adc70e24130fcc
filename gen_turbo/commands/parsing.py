"""The parser of the command line: one sentence for an error, the default in every help text, shell completion."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any, NoReturn

from gen_turbo.config import ConfigError, Override
from gen_turbo.schemas import DTYPES

SHELLS = ("bash", "zsh", "tcsh")
_GUIDANCE = 7.5


class _Help(argparse.HelpFormatter):
    """Ends every help text with the default of its option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        # A flag is off by default; what has no default of its own says what happens without it.
        is_known = default is None or default is False or default in (argparse.SUPPRESS, [], ()) or "(default:" in text
        if is_known or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text.removesuffix(f' ({shown})').removesuffix(f'({shown})')} (default: {shown})".strip()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, and names defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises what `main` prints."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_model_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    """The arguments that say which model runs, and where.

    Args:
        parser: Of a command.
        config: The configuration that is taken where none is named.
    """
    parser.add_argument("--config", help=f"a name that `gen-turbo list` shows, or a YAML file (default: {config})")
    parser.add_argument(
        "--model", metavar="CHECKPOINT", help="owner/name on the hub or a folder (default: that of the configuration)"
    )
    parser.add_argument("--device", help="auto, cpu, mps, cuda or cuda:N (default: auto, the fastest there is)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: auto, on cuda float16 or bfloat16, else float32)"
    )
    parser.set_defaults(default_config=config)


def model_overrides(namespace: argparse.Namespace) -> tuple[str, list[Override]]:
    """The configuration that is meant, and what the arguments of `add_model_arguments` change in it.

    A model without a configuration has the size and the variant that its checkpoint says.
    """
    given: list[Override] = []
    if namespace.model is not None:
        given.append(("checkpoint", namespace.model))
        if namespace.config is None and namespace.default_config == "tiny":
            given += [("height", None), ("width", None), ("variant", None), ("guidance_scale", _GUIDANCE)]
        elif namespace.config is None:
            given += [("variant", None)]
    given += [(name, value) for name in ("device", "dtype") if (value := getattr(namespace, name)) is not None]
    return namespace.config or namespace.default_config, given


def add_completion_arguments(parser: argparse.ArgumentParser, whole: argparse.ArgumentParser) -> None:
    """The arguments of `gen-turbo completion`."""
    parser.add_argument("shell", choices=SHELLS, help='for instance: eval "$(gen-turbo completion bash)"')

    def run(namespace: argparse.Namespace) -> None:
        try:
            shtab: Any = import_module("shtab")
        except ImportError as error:
            raise ConfigError("completion needs shtab; run: pip install 'gen_turbo[completion]'") from error
        print(shtab.complete(whole, namespace.shell))

    parser.set_defaults(run=run)
