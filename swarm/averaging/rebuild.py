"""A fragment that nobody has any more, and of which there is no copy: made anew from its neighbours.

Each of its blocks lies between the nearest blocks before and after it that somebody has, and becomes what lies between
them: their mean, for a single block (after CheckFree, 2025, https://arxiv.org/abs/2506.15461). At the ends of the model
there is one neighbour only. What is in no block (embedding, final norm, head) has none and starts again. Where the run
began with weights that were trained already, those are nearer than any neighbour; an adapter's two matrices mean
something together only, and where it starts again the fragment is its base.

The new history begins with half of the tokens of the neighbour that has fewer: the learning rate goes back with them,
and if the old state comes back soon it has more, and wins. Peers that rebuild at the same moment do it from the same
heads, since nothing is trained while a fragment is missing; where not, more tokens or the lower digest decides
(follow.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from swarm.averaging import outer
from swarm.averaging.apply import Applier
from swarm.averaging.context import Context
from swarm.averaging.download import Shape
from swarm.averaging.elsewhere import said_tokens
from swarm.averaging.global_state import GlobalState
from swarm.averaging.layout import Layout
from swarm.averaging.synchronise import Synchroniser
from swarm.events import Warning
from swarm.model.fragments import FragmentSpec

PATIENCE_S = 20.0
"""before a fragment is given up: who has it may only be starting again"""
LOOK_S = 1.0

log = logging.getLogger(__name__)


class Rebuilder:
    def __init__(
        self, context: Context, synchroniser: Synchroniser, fragments: Sequence[FragmentSpec],
        layouts: Mapping[int, Layout], *, own: Callable[[], Mapping[int, GlobalState]],
        blocks_at: Callable[[], str],
    ) -> None:
        """`fragments`, `layouts`: all of the run's; `own`: states of those that this peer has by now; `blocks_at`: the
        name of the model's list of blocks, such as transformer.h."""
        self._context, self._synchroniser, self._fragments = context, synchroniser, fragments
        self._layouts, self._own, self._blocks_at = layouts, own, blocks_at

    def is_lost(self, applier: Applier) -> bool:
        """The others have trained, and neither they nor this peer have anything of this fragment."""
        index = applier.fragment
        if applier.ledger.state.tokens or self._synchroniser.heads(index):
            return False
        return min((tokens for other, tokens in self._said().items() if other != index), default=0) > 0

    async def rebuild(self, applier: Applier) -> bool:
        """Make a lost fragment anew, after waiting for its state to come back. False: it is not lost (any more). Raises
        StateError, where its neighbours cannot be had either."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        while self.is_lost(applier) and loop.time() < deadline:
            await asyncio.sleep(LOOK_S)
        if not self.is_lost(applier):
            return False
        index, start = applier.fragment, applier.ledger.state
        model = self._context.run.model
        if applier.trusted and (model.source is not None or model.lora is not None):
            tokens = min(self._tokens().values()) // 2
            state = GlobalState(index, 0, tokens, start.weights, start.buffers)
            how = "STARTS AGAIN FROM THE RUN'S OWN WEIGHTS"
        else:
            state = await self._from_neighbours(index, start)
            how = "IS REBUILT FROM ITS NEIGHBOURS"
        await asyncio.to_thread(lambda: state.digest)
        if not self.is_lost(applier):
            return False
        await applier.adopt(state)
        self._context.emit(Warning(
            f"FRAGMENT {index} WAS LOST AND {how}: nobody here has its state, or a copy of it; if a peer that has comes"
            " back, its history wins"
        ))
        return True

    async def _from_neighbours(self, index: int, start: GlobalState) -> GlobalState:
        heads = self._tokens()
        before = max((other for other in heads if other < index), default=None)
        after = min((other for other in heads if other > index), default=None)
        states = [await self._state(other) for other in (before, after) if other is not None]
        spec, layout = self._fragments[index], self._layouts[index]
        blocks: dict[int, dict[str, torch.Tensor]] = {}
        for state in states:
            first, end = self._fragments[state.fragment].blocks
            number = end - 1 if state.fragment < index else first
            views = dict(self._layouts[state.fragment].views(state.weights))
            blocks[number] = of_block(views, self._blocks_at(), number)
        tensors = between(dict(layout.views(start.weights)), self._blocks_at(), spec.blocks, blocks)
        weights = layout.flatten(tensors)
        tokens = min(state.tokens for state in states) // 2
        return GlobalState(index, 0, tokens, weights, tuple(torch.zeros_like(buffer) for buffer in start.buffers))

    async def _state(self, index: int) -> GlobalState:
        own = self._own().get(index)
        if own is not None and own.tokens:
            return own
        shape = Shape(index, self._layouts[index].numel, outer.num_buffers(self._context.run))
        found = await self._synchroniser.fetch(shape, better_than=None)
        assert found is not None, "anything is better than nothing"
        return found[0]

    def _said(self) -> dict[int, int]:
        """Fragment -> tokens, of those that others hold."""
        return said_tokens(self._context.directory.alive().values())

    def _tokens(self) -> dict[int, int]:
        """Fragment -> tokens, of those that somebody has trained."""
        own = {index: state.tokens for index, state in self._own().items()}
        return {index: tokens for index, tokens in sorted((self._said() | own).items()) if tokens}


def of_block(tensors: Mapping[str, torch.Tensor], blocks_at: str, number: int) -> dict[str, torch.Tensor]:
    """Of named tensors those in one block, by their names inside it."""
    start = f"{blocks_at}.{number}."
    return {name[len(start):]: values for name, values in tensors.items() if name.startswith(start)}


def between(
    start: Mapping[str, torch.Tensor], blocks_at: str, span: tuple[int, int],
    neighbours: Mapping[int, Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The tensors of blocks [first, end), each on the line between its neighbours; fp32.

    `start`: what they are without, and what all that no neighbour has in this shape stays; `neighbours`: block -> its
    tensors by their names inside it, one or two blocks outside of the span. In elementary operations, each rounded by
    itself: the same bits everywhere.
    """
    result = dict(start)
    before = max((number for number in neighbours if number < span[0]), default=None)
    after = min((number for number in neighbours if number >= span[1]), default=None)
    for number in range(*span):
        for inside, values in of_block(start, blocks_at, number).items():
            found = {
                near: neighbours[near][inside] for near in (before, after)
                if near is not None and inside in neighbours[near] and neighbours[near][inside].shape == values.shape
            }
            if before in found and after in found:
                assert before is not None and after is not None
                share = (number - before) / (after - before)
                low, high = torch.mul(found[before], 1 - share), torch.mul(found[after], share)
                result[f"{blocks_at}.{number}.{inside}"] = torch.add(low, high)
            elif found:
                [only] = found.values()
                result[f"{blocks_at}.{number}.{inside}"] = only
    return result
