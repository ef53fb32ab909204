"""How the small programs start and end: quiet libraries, errors as people read them, Ctrl+C without a traceback.

For chat, evaluate, and the scripts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence


def guarded(work: Callable[[], int]) -> int:
    """Do `work` and return the exit code; a stated error is printed, 130 after Ctrl+C."""
    from swarm.errors import SwarmError

    try:
        return work()
    except SwarmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def start(main: Callable[[Sequence[str]], int]) -> None:
    """Run a script's `main` as the program; does not return."""
    from swarm.peer import quiet_libraries

    quiet_libraries(False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: whoever read has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl+C would only add a traceback to the end
    sys.exit(code)
