"""Interrupts: Ctrl-C and SIGTERM end a command in order, with one line that says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HOW = "Call the same command again; it starts anew, unless its result is there."


class Interrupt(BaseException):
    """A signal that asks a command to end.

    No KeyboardInterrupt, which typer makes an exit of that has lost its notes.

    Attributes:
        status: What a shell calls the end by this signal: 128 and its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupt` in the block on Ctrl-C and SIGTERM; what the signals did before, they do again after it.

    A signal that is ignored, as by `nohup` and for jobs in the background, stays so. Signals come to the main thread
    only; in any other the block runs as it is.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupt(number)

    here = threading.current_thread() is threading.main_thread()
    heard = [each for each in _SIGNALS if here and signal.getsignal(each) not in (signal.SIG_IGN, None)]
    before = {each: signal.signal(each, stop) for each in heard}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def how_to_go_on(interrupt: BaseException) -> str:
    """Return the line that says what was interrupted, and how to go on.

    Examples:
        >>> how_to_go_on(Interrupt(signal.SIGINT))
        'Interrupted. Call the same command again; it starts anew, unless its result is there.'
    """
    notes = getattr(interrupt, "__notes__", [])
    return f"Interrupted. {notes[0] if notes else _HOW}"
