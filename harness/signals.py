"""End at a scheduler's or closed terminal's signals as at Ctrl-C, so that the run says how to go on."""
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = ("SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has only the first
AGAIN = 1.0  # seconds until an exception that was lost is raised again


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the block runs, one of these signals raises SystemExit with the code 128 + its number.

    Code in C between two lines of Python may drop what a handler raises without a word (torch does, while it
    looks up attributes of a tensor's type): it is raised again every second, until an `except`, `finally` or
    `with` deals with it. From then on neither the clock nor another such signal interrupts what these do.
    """
    ending: SystemExit | None = None
    clock = hasattr(signal, "setitimer")  # not on Windows

    def end(number: int, _: object) -> None:
        """Raise the one exception of all these signals, unless it is dealt with already."""
        nonlocal ending
        if ending is None:
            ending = SystemExit(128 + number)
            if clock:
                signal.signal(signal.SIGALRM, end)
                signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        if not is_dealt_with(ending):
            raise ending

    for name in ENDING:
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        if clock:
            signal.setitimer(signal.ITIMER_REAL, 0)


def is_dealt_with(error: BaseException) -> bool:
    """Whether the code that runs now does so because of this error."""
    current = sys.exc_info()[1]
    while current is not None and current is not error:
        current = current.__context__
    return current is error
