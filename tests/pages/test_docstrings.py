"""What is public says what it does, what it takes, and what it raises."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

from tests.pages.telling import lacking
from tests.rules.sources import PACKAGE, SOURCES, named
from tests.test_docs import documented, dotted

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of all that a module defines for others: functions, classes, their methods and properties."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def overrides(node: ast.AST) -> bool:
    return any(ast.unparse(each).endswith(("overload", ".setter")) for each in getattr(node, "decorator_list", ()))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_everything_public_has_a_docstring_that_begins_with_a_sentence(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "a module says what it is"
    for name, node in public(path):
        if overrides(node):
            continue
        text = ast.get_docstring(node)
        assert text, f"{name} has no docstring"
        assert re.match(r"[A-Z`$\d].*[.:?]$", text.splitlines()[0]), f"{name} begins with {text.splitlines()[0]!r}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_arguments_that_a_docstring_lists_are_those_of_the_signature(path: Path) -> None:
    for name, node in public(path):
        text = ast.get_docstring(node) or ""
        taken = node
        if isinstance(node, ast.ClassDef):
            taken = next((each for each in node.body if isinstance(each, Function) and each.name == "__init__"), None)
        if "\nArgs:\n" not in text or taken is None:
            continue
        listed = re.findall(r"^    \*{0,2}(\w+): ", text.split("\nArgs:\n")[1].split("\n\n")[0], re.MULTILINE)
        arguments = taken.args
        known = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        assert set(listed) <= {each.arg for each in known if each}, name


def shown(path: Path) -> Iterator[tuple[str, Function, str]]:
    """(name, node, docstring) of the functions and methods of a module that are on the pages of the API."""
    pages, module = documented(), dotted(path)
    for name, node in public(path):
        top = name.partition(".")[0]
        exported = any((above, top) in pages for above in accumulate(module.split("."), "{}.{}".format))
        if isinstance(node, Function) and not overrides(node) and (exported or (module, "*") in pages):
            yield name, node, ast.get_docstring(node) or ""


# What a command takes is told by its help, which has tests of its own.
TOLD_BY_HELP = [path for path in SOURCES if path.parent.name == "commands"]


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in TOLD_BY_HELP], ids=named)
def test_what_is_on_the_pages_tells_parameters_shapes_units_errors_and_sources(path: Path) -> None:
    classes = {name: ast.get_docstring(node) or "" for name, node in public(path) if isinstance(node, ast.ClassDef)}
    for name, node, text in shown(path):
        assert not lacking(name, node, text, classes.get(name.rpartition(".")[0], "")), f"what {name} does not tell"


TOLD = """Return the NLL of a model, in nats per token: $$-\\frac1n \\sum_i \\log p_i$$ (Author 2020).

    Args:
        logits: Of the next tokens. Shape: `(batch, vocabulary)`.
        layer: A name.

    Raises:
        KeyError: If there is no such layer.
    """


@pytest.mark.parametrize(
    ("left_out", "missed"),
    [
        ("", []),
        ("        layer: A name.\n", ["its parameter layer"]),
        (" Shape: `(batch, vocabulary)`.", ["the shapes of its tensors"]),
        ("KeyError", ["KeyError among what it raises"]),
        (", in nats per token", ["that it is in nats"]),
        (" (Author 2020)", ["where its formula is from"]),
    ],
)
def test_a_docstring_that_leaves_something_out_is_seen(left_out: str, missed: list[str]) -> None:
    assert left_out in TOLD
    source = "def mean_nll(logits: Tensor, *, layer: str) -> float:\n    raise KeyError(layer)\n"
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    assert lacking("mean_nll", node, inspect.cleandoc(TOLD.replace(left_out, ""))) == missed


def test_a_parameter_that_is_in_no_sentence_is_seen() -> None:
    (node,) = ast.parse("def save(model, path): ...").body
    assert isinstance(node, ast.FunctionDef)
    assert lacking("save", node, "Write a module to a file.") == []
    assert lacking("save", node, "Write it to a file.") == ["its parameter model"]


def test_a_missing_docstring_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text('"""A module."""\ndef f(x):\n    return x\n')
    with pytest.raises(AssertionError, match="f has no docstring"):
        test_everything_public_has_a_docstring_that_begins_with_a_sentence(wrong)
    wrong.write_text('"""A module."""\ndef f(x):\n    """Do it.\n\n    Args:\n        y: What.\n    """\n')
    with pytest.raises(AssertionError, match="f"):
        test_arguments_that_a_docstring_lists_are_those_of_the_signature(wrong)
    assert PACKAGE in SOURCES[0].parents
