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
        advice = 'Install it: pip install "torch-simu[int8]".'
        raise ImportError(problem(f"{what} needs bitsandbytes", "it installed", advice)) from error
    return functional
