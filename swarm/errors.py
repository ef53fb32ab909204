"""Errors that people see: what happened, why, and what to do about it.

    SwarmError
    |- ConfigError        a file, flag or variable says something that cannot be (exit code 2)
    |- JoinError          no way into the swarm: no run, wrong run, clock off, identity in use
    |  `- NobodyAnswers   none of the initial peers
    |- NetworkError       one call to one peer failed
    |  |- PeerGone        the link broke or the deadline passed
    |  |- PeerRefused     the other side said no, with its reason
    |  `- BadMessage      the other side sent something that breaks the protocol
    |- StateError         downloaded or stored state is missing or does not match its hash
    `- HomeError          the home folder cannot be used (permissions, full disk, taken by another peer)

The entry points print `str(error)` and leave; a traceback appears only with -v. `assert` is for our own bugs.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Base of everything a user may see. `what` happened, `why`, and what to `do`."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.do = what, why, do

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.do:
            lines.append(f"  do:   {self.do}")
        return "\n".join(lines)


class ConfigError(SwarmError):
    exit_code = 2


class JoinError(SwarmError):
    pass


class NobodyAnswers(JoinError):
    pass


class NetworkError(SwarmError):
    pass


class PeerGone(NetworkError):
    pass


class PeerRefused(NetworkError):
    pass


class BadMessage(NetworkError):
    pass


class StateError(SwarmError):
    pass


class HomeError(SwarmError):
    pass
