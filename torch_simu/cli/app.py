"""torch-simu: the command line."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any, cast

try:
    import typer
    from rich.console import Console
    from typer.core import TyperGroup
except ImportError as error:
    raise ImportError(
        "The command line needs typer and rich. Run: pip install typer rich transformers accelerate matplotlib"
    ) from error

import torch_simu
from torch_simu._checks import problem
from torch_simu.cli.commands.attack import attack
from torch_simu.cli.commands.demo import demo
from torch_simu.cli.commands.help import examples, show_help
from torch_simu.cli.commands.jobs import attribute, evaluate, unlearn
from torch_simu.cli.commands.patch import app as patch_app
from torch_simu.cli.commands.recommend import recommend
from torch_simu.cli.console import plain, quiet_casts, say
from torch_simu.cli.interrupts import Interrupt, how_to_go_on, interruptible

# The base of all usage errors: typer names only this one of its kind, and brings its own copy of click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_SETS = "--forget forget.jsonl --retain retain.jsonl"

_DEBUG = "TORCH_SIMU_DEBUG"


def _version(asked: bool) -> None:
    if asked:
        say(Console(), f"torch-simu {torch_simu.__version__}")
        raise typer.Exit


def _about(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make a language model forget chosen data and keep the rest."""
    show_help(context)


class _Commands(TyperGroup):
    """The commands. Files may end too early in them, which typer would take for an interruption of its user."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            reason = str(error) or "it says no more"
            raise OSError(problem(f"A file ends too early ({reason})", "a whole one", "Get it again.")) from error


def _application() -> typer.Typer:
    found = typer.Typer(
        cls=_Commands,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    found.callback(
        invoke_without_command=True,
        epilog=examples(
            "torch-simu demo",
            f"torch-simu unlearn --model MODEL_DIR {_SETS} --out OUT_DIR",
            f"torch-simu evaluate --model OUT_DIR {_SETS} --reference MODEL_DIR",
        ),
    )(_about)
    found.command(epilog=examples("torch-simu demo", "torch-simu demo --seed 1 --out simu-demo-1"))(demo)
    found.command(
        epilog=examples(
            f"torch-simu recommend --model MODEL_DIR {_SETS} --minutes 10",
            f"torch-simu recommend --model MODEL_DIR {_SETS} --minutes 5 --load-in 8bit --forget-target 0.05",
        )
    )(recommend)
    found.command(
        epilog=examples(
            f"torch-simu unlearn --model MODEL_DIR {_SETS} --out OUT_DIR",
            f"torch-simu unlearn --model MODEL_DIR {_SETS} --out OUT_8BIT --lr 1e-3 --load-in 8bit",
        )
    )(unlearn)
    found.command(
        epilog=examples(
            f"torch-simu evaluate --model OUT_DIR {_SETS} --reference MODEL_DIR",
            f"torch-simu evaluate --model MODEL_DIR {_SETS} --out before.json",
            f"torch-simu evaluate --model OUT_DIR {_SETS} --reference before.json",
        )
    )(evaluate)
    found.command(
        epilog=examples(
            f"torch-simu attack --model OUT_DIR {_SETS} --reference MODEL_DIR",
            "torch-simu attack --model OUT_DIR --forget forget.jsonl --attacks relearn --rates 1e-5,1e-4 --steps 20 "
            "--out attack.json",
        )
    )(attack)
    found.command(
        epilog=examples(
            "torch-simu attribute --model MODEL_DIR --forget forget.jsonl --out SCORES_DIR",
            f"torch-simu attribute --model MODEL_DIR {_SETS} --rule contrast --fraction 0.05 --out CONTRAST_DIR",
        )
    )(attribute)
    found.add_typer(patch_app, name="patch")
    return found


app = _application()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on arguments, by default the program's; an error is one line on standard error, status 2.

    With `TORCH_SIMU_DEBUG=1` in the environment its traceback stands before the line. Ctrl-C and SIGTERM get one that
    says how to go on, and exit status 130 and 143.
    """
    try:
        with interruptible(), quiet_casts():
            status = app(arguments, standalone_mode=False)
    except Interrupt as interrupt:
        _fail(how_to_go_on(interrupt), status=interrupt.status)
    except _UsageError as error:
        _fail(cast("typer.BadParameter", error).format_message(), error=error)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", status=130)
    except (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError) as error:
        # KeyError shows the repr of its message; the message itself is what helps.
        _fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error), error=error)
    except SystemExit:
        raise
    # Not Exception: a panic in the Rust of tokenizers or safetensors is none.
    except BaseException as error:
        shows = "" if _debugging() else f" ({_DEBUG}=1 shows the traceback)"
        _fail(f"{type(error).__name__}: {error}{shows}", error=error)
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2, error: BaseException | None = None) -> None:
    if error is not None and _debugging():
        sys.stderr.writelines(map(_shown, traceback.format_exception(error)))
    line = plain(" ".join(message.split())) or "failed without a message"
    sys.stderr.write(f"torch-simu: {line}\n")
    sys.exit(status)


def _shown(lines: str) -> str:
    return "".join(f"{plain(line)}\n" for line in lines.splitlines())


def _debugging() -> bool:
    return os.environ.get(_DEBUG, "0") not in ("", "0")
