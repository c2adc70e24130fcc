"""Small changes of a source file, each of which some test should notice."""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd, ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: Path from the root of the repository.
        number: Which change of that file, from 0 on.
        node: Which node of the tree, in the order of `ast.walk`.
        kind: What is done to it.
        part: Which comparison or keyword of the node.
        lines: Of the code that is changed, first and last.
        is_inner: Whether it is in the body of a function, so that importing the file does not run it.
    """

    file: str
    number: int
    node: int
    kind: str
    part: int
    lines: tuple[int, int]
    is_inner: bool

    def tree(self) -> ast.Module:
        """The file with the change."""
        return self._changed()[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.lines[0]} {self.kind}: {self._changed()[1]}"

    def _changed(self) -> tuple[ast.Module, str]:
        tree = ast.parse(Path(self.file).read_text())
        node: Any = list(ast.walk(tree))[self.node]
        before = ast.unparse(getattr(node, "test", node) if self.kind == "negated" else node)
        match self.kind:
            case "comparison":
                node.ops[self.part] = _COMPARED[type(node.ops[self.part])]()
            case "operator":
                node.op = _COMPUTED[type(node.op)]()
            case "and or":
                node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            case "constant":
                node.value = _other(node.value)
            case "negated":
                node.test = ast.UnaryOp(ast.Not(), node.test)
            case "keyword left out":
                del node.keywords[self.part]
            case "sign left out":
                tree, node = _Replaced(node, node.operand).visit(tree), node.operand
            case _:
                node.value = ast.Constant(None)
        ast.fix_missing_locations(tree)
        after = "" if self.kind == "negated" else " -> " + ast.unparse(node)
        return tree, " ".join((before + after).split())


class _Replaced(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(file: str) -> list[Mutant]:
    """Every change of a file: annotations, decorators, imports and the words of messages stay as they are."""
    tree = ast.parse(Path(file).read_text())
    bodies = [
        (node.body[0].lineno, node.body[-1].end_lineno) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    left_alone = _left_alone(tree)
    found: list[Mutant] = []
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in left_alone:
            continue
        for kind, part in _kinds(node):
            changed = node.test if kind == "negated" else node
            lines = changed.lineno, changed.end_lineno or changed.lineno
            is_inner = any(first <= lines[0] <= last for first, last in bodies)
            found.append(Mutant(file, len(found), number, kind, part, lines, is_inner))
    return found


def _kinds(node: Any) -> Iterator[tuple[str, int]]:  # noqa: C901  one line for each kind
    match node:
        case ast.Compare():
            yield from (("comparison", part) for part in range(len(node.ops)))
        case ast.BinOp() | ast.AugAssign() if type(node.op) in _COMPUTED:
            yield "operator", 0
        case ast.BoolOp():
            yield "and or", 0
        case ast.UnaryOp():
            yield "sign left out", 0
        case ast.Constant() if node.value is not None and node.value is not ...:
            yield "constant", 0
        case ast.If() | ast.IfExp() | ast.While():
            yield "negated", 0
        case ast.Return() if node.value is not None and ast.unparse(node.value) != "None":
            yield "returns None", 0
        case ast.Call():
            yield from (("keyword left out", part) for part, given in enumerate(node.keywords) if given.arg)
        case ast.Expr(ast.Call()):
            yield "call left out", 0
        case ast.Assign(value=ast.Call()):
            yield "None assigned", 0


def _left_alone(tree: ast.Module) -> set[int]:
    """The ids of nodes in annotations, docstrings, messages, imports and decorators."""
    tops: list[Any] = []
    for node in ast.walk(tree):
        tops += [getattr(node, name, None) for name in ("annotation", "returns")]
        tops += getattr(node, "decorator_list", [])
        if isinstance(node, ast.Raise | ast.ImportFrom | ast.Import | ast.JoinedStr):
            tops.append(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            tops.append(node)
    return {id(inner) for top in tops if isinstance(top, ast.AST) for inner in ast.walk(top)}


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + "XX" if isinstance(value, str) else value + 1


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with a change."""

    def __init__(self, module: str, mutant: Mutant) -> None:
        self.module, self.mutant = module, mutant

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        self.inner = importlib.util.find_spec(name)
        return importlib.util.spec_from_file_location(
            name, self.mutant.file, loader=self, submodule_search_locations=self.inner.submodule_search_locations
        )

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        exec(compile(self.mutant.tree(), os.path.abspath(self.mutant.file), "exec"), module.__dict__)


def codes_of(code: types.CodeType, into: dict[tuple[str, int], types.CodeType]) -> None:
    """Adds the code of every function inside of a code, by its name and first line."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            into[inner.co_qualname, inner.co_firstlineno] = inner
            codes_of(inner, into)


class Told:
    """Says which test failed."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self.stream, report.nodeid.encode()[:500])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.pytest_runtest_logreport(report)  # type: ignore[arg-type]


class Ordered:
    """Runs the tests of a mutant, in their order."""

    def __init__(self, order: dict[str, int]) -> None:
        self.order = order

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])
