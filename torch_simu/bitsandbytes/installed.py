"""bitsandbytes itself, imported where it is needed only."""

from __future__ import annotations

from typing import Any

from torch_simu._checks import problem


def require_bitsandbytes(what: str) -> Any:
    """Return bitsandbytes' functional module.

    Args:
        what: What needs it, for the message.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        advice = 'Run: pip install "bitsandbytes>=0.50"'
        raise ImportError(problem(f"{what} needs bitsandbytes", "it installed", advice)) from error
    return functional
