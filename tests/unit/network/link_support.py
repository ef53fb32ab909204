"""Two ends of a link over a socket pair, for tests: both ours, or one that speaks raw bytes."""

import asyncio
import contextlib
import socket

from swarm.errors import PeerRefused
from swarm.network import frames
from swarm.network.link import Link, Method

PATIENCE_S = 20.0
MB = 1024 * 1024


async def soon(condition):
    async def poll():
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), PATIENCE_S)


async def echo(link, header, body):
    return header, body


async def refuse(link, header, body):
    raise PeerRefused("not today")


async def stumble(link, header, body):
    raise KeyError("a bug")


METHODS = {
    "echo": Method(echo, 64 * MB), "small": Method(echo, 10), "refuse": Method(refuse, 64 * MB),
    "stumble": Method(stumble, 0),
}  # fmt: skip


async def streams():
    ours, theirs = socket.socketpair()
    return await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)


@contextlib.asynccontextmanager
async def two_links(methods=METHODS, budget=None, lines=None):
    """(asker, answerer): both greeted. `lines`: the asker's, up and down."""
    (reader, writer), (reader2, writer2) = await streams()
    asker = Link("A" * 20, reader, writer, dict(METHODS), lines=lines)
    answerer = Link("B" * 20, reader2, writer2, dict(methods), budget=budget)
    asker.greeted = answerer.greeted = True
    try:
        yield asker, answerer
    finally:
        asker.close()
        answerer.close()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def one_link(methods=METHODS, *, greeted=True, **more):
    """(link, reader and writer of its other end, which speaks raw bytes)."""
    (reader, writer), (reader2, writer2) = await streams()
    answerer = Link("B" * 20, reader, writer, dict(methods), **more)
    answerer.greeted = greeted
    try:
        yield answerer, reader2, writer2
    finally:
        answerer.close()
        writer2.close()
        await asyncio.sleep(0)


def request(call, method, length=0, header=None):
    return frames.pack(frames.REQUEST, call, frames.pack_head({"m": method, "h": header or {}, "n": length}))


async def closed_with(answerer, *data, writer):
    for part in data:
        writer.write(part)
    await asyncio.wait_for(answerer.closed.wait(), PATIENCE_S)


async def read_frame(reader):
    return await asyncio.wait_for(frames.read(reader), PATIENCE_S)


def run(test):
    asyncio.run(asyncio.wait_for(test(), 60))
