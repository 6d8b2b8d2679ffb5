"""Help: the pages of the commands, and the examples at their ends."""

from __future__ import annotations

import shlex

import typer

_WIDTH = 76


def examples(*commands: str) -> str:
    r"""Return the end of a help page that shows how to call a command: lines that a shell takes as they are.

    Examples:
        >>> examples("torch-simu demo --seed 1").splitlines()
        ['\x08', 'Examples:', '  torch-simu demo --seed 1']
    """
    # The first character asks for lines that are not filled anew.
    return "\n".join(["\b", "Examples:", *(line for command in commands for line in _folded(command))])


def show_help(context: typer.Context) -> None:
    """Print the page of a group of commands, where none of them was named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _folded(command: str) -> list[str]:
    words, lines = [shlex.quote(word) for word in shlex.split(command)], ["  "]
    for number, word in enumerate(words):
        # An option and its value stay together.
        unit = word + (f" {words[number + 1]}" if word.startswith("--") and number + 1 < len(words) else "")
        if len(lines[-1]) + len(unit) > _WIDTH:
            lines[-1] += "\\"
            lines.append("      ")
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]
