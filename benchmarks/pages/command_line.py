"""The page of the command line, from the commands themselves: every option as it is typed, its default and help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from torch_simu.cli.app import app

HEAD = """\
# Command line

`torch-simu COMMAND -h` shows the same in a terminal: this page is written from the program. It needs the extras
`transformers` and `cli`, and `plots` where plots are drawn ([install](../index.md#install)). What the methods do is in
[Unlearning](../api/unlearning.md), what the attacks do in [Attack](../api/attack.md).

| exit status | when |
|---|---|
| 0 | done |
| 1 | `patch verify`: the patch is not what changed |
| 2 | an error, told in one line; `TORCH_SIMU_DEBUG=1` in the environment shows its traceback before it |
| 3 | `unlearn`: everything is written, but the forget target was not reached |
| 130, 143 | Ctrl-C, SIGTERM: one line says how to go on |
"""


def page() -> Iterator[str]:
    """The lines of the page."""
    yield from HEAD.splitlines()
    root = typer.main.get_command(app)
    yield from _command(root, root.make_context("torch-simu", [], resilient_parsing=True))


def _command(command: Any, context: Any) -> Iterator[str]:
    path = context.command_path.split()
    yield from ("", f"{'#' * max(2, len(path))} {' '.join(path)}", "", _prose(command.help), "")
    yield from ("```text", " ".join(command.get_usage(context).removeprefix("Usage: ").split()), "```")
    for param in command.get_params(context):
        yield from ("", *_param(param, context, "-".join(path[1:] or path)))
    if command.epilog:
        lines = command.epilog.split("Examples:\n")[1].splitlines()
        yield from ("", "```shell", *(line.removeprefix("  ") for line in lines), "```")
    for name, inner in getattr(command, "commands", {}).items():
        yield from _command(inner, inner.make_context(name, [], parent=context, resilient_parsing=True))


def _param(param: Any, context: Any, prefix: str) -> Iterator[str]:
    typed, told = param.get_help_record(context)
    told, _, note = told.partition("  [")
    # What `--option` and its value are called stands in the anchor, so that a page can point at one of them.
    anchor = f"{prefix}-{param.name.replace('_', '-')}"
    required = " *required*" if note == "required]" else ""
    default = f" Default: `{note[9:-1]}`." if note.startswith("default: ") else ""
    yield f"`{typed}`{{ #{anchor} }}{required}"
    yield f":   {_prose(told)}{default}"


def _prose(text: str) -> str:
    text = re.sub(r"([<>*\[\]])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"`\1`", text)
