"""python -m swarm.peer: start a run, join one, or resume. The composition root: reads config, builds the parts, runs.

The first Ctrl+C (or SIGTERM) finishes: the contribution at hand goes into a round and state is handed over. The second
stops now. SIGUSR1 writes to stderr where every thread is. Exit codes: 0 done, 1 a stated error, 2 usage.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from swarm import cli
from swarm.config import PeerConfig
from swarm.errors import SwarmError

POLL_S = 0.25


def main(argv: list[str] | None = None) -> int:
    try:
        config = cli.parse(sys.argv[1:] if argv is None else argv, dict(os.environ))
    except SwarmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    quiet_libraries(config.verbose)
    if not config.restart:
        return live(config)
    from swarm import restart

    try:
        return restart.watch(config, live)
    except SwarmError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def live(config: PeerConfig, on_ready: Callable[[], object] = lambda: None) -> int:
    """`run`, with every error told to the person, as an exit code."""
    try:
        return run(config, on_ready)
    except SwarmError as error:
        if config.verbose:
            traceback.print_exc()
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if config.verbose:
            traceback.print_exc()
        print(f"an error that nobody expected: {type(error).__name__}: {error}", file=sys.stderr)
        print("  do:   run again with -v, and report what it shows; the same command resumes", file=sys.stderr)
        return 1


def run(config: PeerConfig, on_ready: Callable[[], object] = lambda: None) -> int:
    """Live as the peer that `config` describes, until it is done or told to stop. `on_ready`: called once it takes
    part. Raises SwarmError."""
    from swarm.events import Bus, Left, Warning  # what follows imports torch: --help must not wait for it
    from swarm.host.home import Home
    from swarm.monitor.console import make_ui
    from swarm.monitor.journal import Journal
    from swarm.train.participant import Participant

    stop = Stop()
    bus = Bus()
    ui = make_ui(config.ui, sys.stdout, verbose=config.verbose)
    bus.listen(ui)
    journals: list[Journal] = []

    def keep_journal(folder: os.PathLike[str]) -> None:
        journal = Journal(folder, warn=lambda text: bus.emit(Warning(text)))  # type: ignore[arg-type]
        journals.append(journal)
        bus.listen(journal)

    with contextlib.ExitStack() as stack:
        stack.callback(ui.close)
        home = stack.enter_context(Home.open(config.home))
        participant = Participant(config, home, bus, on_run=keep_journal)
        stack.callback(participant.close)
        for note in home.notes:
            bus.emit(Warning(note))
        stop.install()
        with contextlib.suppress(CalledOff), stop.at_once():
            participant.join()
        reason = None
        if not stop.asked:
            participant.start()
            on_ready()
            while reason is None and not stop.asked:
                time.sleep(POLL_S)
                reason = participant.finished()
            participant.leave()
        bus.emit(Left(reason or "told to stop"))
    for journal in journals:
        journal.close()
    return 0


class CalledOff(BaseException):
    """The first signal, while joining; not an Exception, which others may suppress."""


class Stop:
    """Turns the first signal into a request to finish and the second into an end at once.

    `asked` is a plain attribute: a handler runs between two instructions of the main thread, and if those were in the
    middle of an Event's wait(), its set() would wait for a lock that the main thread itself holds, for ever.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Here the first signal raises CalledOff: there is nothing yet to finish, and joining can take minutes."""
        self._at_once = True
        try:
            if self.asked:
                raise CalledOff
            yield
        finally:
            self._at_once = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(signal.SIGUSR1, file=2)  # all threads; from C, so also when nothing else moves

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(130)  # the watchdog ends p2pd and removes its sockets
        self.asked = True
        if self._at_once:
            raise CalledOff
        with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of another one
            os.write(2, b"finishing the round; again to stop now\n")


def quiet_libraries(verbose: bool) -> None:
    """Libraries write to the terminal as if it were theirs; only -v shows that."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "INFO" if verbose else "CRITICAL")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("swarm")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose else logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
