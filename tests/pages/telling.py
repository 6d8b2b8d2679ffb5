"""What a docstring has to tell: parameters, shapes of tensors, errors, units, and where a formula is from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef

UNITS = {
    "nll|nlls|log_prob|log_probs|log_likelihood": "nats",
    "seconds|minutes|timeout": "second|minute",
    "bytes|byte_budget": "byte",
    "auc": "guess|0.5",
}
"""A part of a name -> the word for what it is counted in."""

OTHER_WORDS = {"path": "file|folder", "model": "module", "text": "word"}
"""What a parameter is called in a sentence, beside its name."""

# A shape in words or as a tuple of sizes.
_SHAPE = re.compile(r"[Ss]hape|`\((?:\w+,|\d|\.\.\.)")
# Where a number may stand for it, it is one, and what holds tensors by name is a batch or a state.
_TENSOR = re.compile(r"(?:torch\.)?Tensor|(?:Sequence|list|tuple|Iterable)\[(?:(?:torch\.)?Tensor|[, .])+\]")
_NUMBER = re.compile(r"\b(?:int|float|bool|complex)\b")
# What ends a command, and functions that make the error.
_NO_ERROR = re.compile(r"typer\.Exit|Interrupt|[a-z_]\w*$")
_SOURCE = re.compile(r"\b(?:19|20)\d\d\b|arXiv|`\w[\w.]*`|FINDINGS|Algorithm")


def parameters(node: Function) -> list[ast.arg]:
    """What a call may give."""
    taken = node.args
    every = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
    return [each for each in every if each.arg not in ("self", "cls") and not each.arg.startswith("_")]


def section(text: str, title: str) -> str:
    """The lines below a title of a docstring."""
    found = re.search(rf"^{title}:\n((?: +.*\n|\n)*)", text + "\n", re.MULTILINE)
    return found[1] if found else ""


def errors_of(node: ast.AST) -> Iterator[str]:
    """The classes of the errors that the body of a function raises itself."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(each, ast.Raise) and each.exc is not None:
            yield ast.unparse(each.exc).partition("(")[0]
        yield from errors_of(each)


def said(name: str, text: str) -> bool:
    """Whether the words of a docstring name a parameter: `layer`, or "of a layer", for layer."""
    plain, others = name.rstrip("_").removesuffix("s"), OTHER_WORDS.get(name, "$^")
    parts = [part for part in plain.split("_") if part]
    return all(re.search(rf"(?i){re.escape(part)}", text) for part in parts) or bool(re.search(others, text))


def is_tensor(annotation: ast.expr) -> bool:
    """Whether what is annotated has a shape."""
    parts = ast.unparse(annotation).split(" | ")
    return any(map(_TENSOR.fullmatch, parts)) and not any(map(_NUMBER.search, parts))


def lacking(name: str, node: Function, text: str, above: str = "") -> list[str]:
    """What the docstring of a function, or that of its class above it, does not tell."""
    found, listed = [], set(re.findall(r"^    \*{0,2}(\w+):", section(text, "Args"), re.MULTILINE))
    taken = parameters(node)
    for each in taken:
        if each.arg not in listed if listed else not said(each.arg, above + text):
            found.append(f"its parameter {each.arg}")
    typed = [each for each in [*(each.annotation for each in taken), node.returns] if each is not None]
    if any(map(is_tensor, typed)) and not _SHAPE.search(above + text):
        found.append("the shapes of its tensors")
    for error in sorted(set(errors_of(node))):
        if not _NO_ERROR.fullmatch(error) and error not in section(text, "Raises"):
            found.append(f"{error} among what it raises")
    for names, unit in UNITS.items():
        own = [name.rpartition(".")[2], *(each.arg for each in taken)]
        if any(re.search(rf"(?:^|_)(?:{names})(?:_|$)", each) for each in own) and not re.search(unit, text):
            found.append(f"that it is in {unit}")
    if re.search(r"\$\$|\\frac|\\sum", text) and not _SOURCE.search(text):
        found.append("where its formula is from")
    return found
