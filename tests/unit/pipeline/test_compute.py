"""Forward and backward on one stage: which weights a backward uses, and when gradients count."""

from __future__ import annotations

import pytest
import torch

from swarm.errors import PeerRefused
from swarm.model import working
from swarm.pipeline.compute import StageCompute
from tests.unit.pipeline.toy import Toy, fragments_of, in_one_process, microbatches

NUM = 3


def held(first: int, end: int) -> tuple[StageCompute, dict[str, torch.nn.Parameter]]:
    stage = Toy(NUM)
    fragments = {i: f for i, f in fragments_of(NUM).items() if first <= i < end}
    parameters = dict(stage.model.named_parameters())
    names = [t.name for f in fragments.values() for t in f.tensors]
    own = {name: parameters[name] for name in names}
    return StageCompute(stage, fragments, own), own  # type: ignore[arg-type]


def through(stages: list[StageCompute], key: int, tokens: torch.Tensor, cuts: list[int]) -> float:
    """One microbatch down the stages and back, its gradients left to wait."""
    values = tokens
    for stage, start, end in zip(stages[:-1], cuts, cuts[1:], strict=False):
        values = stage.forward(key, values, start=start, end=end, tokens=tokens.numel())
    loss, gradient = stages[-1].loss(key, values, tokens, start=cuts[-2], end=cuts[-1])
    for stage in reversed(stages[:-1]):
        gradient = stage.backward(key, gradient)
    return loss


def test_two_stages_make_the_gradients_of_one_process() -> None:
    texts = microbatches(5, seed=3)
    wanted, losses = in_one_process(NUM, texts)
    stages = [held(0, 1)[0], held(1, 3)[0]]
    found = [through(stages, key, tokens, [0, 1, 3]) for key, tokens in enumerate(texts)]
    assert found == pytest.approx(losses, rel=1e-6)
    for stage in stages:
        for key in range(5):
            stage.commit(key)
        for fragment in stage.fragments:
            assert stage.tokens(fragment) == 5 * texts[0].numel()
            gradients, tokens = stage.take(fragment)
            for name, values in gradients.items():
                torch.testing.assert_close(values * tokens, wanted[name], rtol=1e-5, atol=1e-5)


def test_a_microbatch_may_use_a_part_of_the_stage() -> None:
    tokens = microbatches(1, seed=4)[0]
    wanted, _ = in_one_process(NUM, [tokens])
    whole, middle = held(0, 3)[0], held(1, 2)[0]
    values = whole.forward("a", tokens, start=0, end=1, tokens=tokens.numel())
    values = middle.forward("a", values, start=1, end=2, tokens=tokens.numel())
    _, gradient = whole.loss("b", values, tokens, start=2, end=3)
    whole.backward("a", middle.backward("a", gradient))
    for stage, key in ((whole, "a"), (whole, "b"), (middle, "a")):
        stage.commit(key)
    assert [whole.tokens(f) for f in range(3)] == [tokens.numel(), 0, tokens.numel()]
    for stage, fragment in ((whole, 0), (middle, 1), (whole, 2)):
        gradients, count = stage.take(fragment)
        assert gradients
        for name, found in gradients.items():
            torch.testing.assert_close(found * count, wanted[name], rtol=1e-5, atol=1e-5)


def test_the_backward_uses_the_weights_of_its_forward() -> None:
    """Steps and rounds come between; what they write goes to new memory while a graph needs the old one."""
    texts = microbatches(2, seed=5)
    wanted, _ = in_one_process(NUM, texts[:1])
    stages, parameters = zip(held(0, 1), held(1, 3), strict=True)
    values = stages[0].forward(0, texts[0], start=0, end=1, tokens=texts[0].numel())
    before = {name: p.detach().clone() for name, p in parameters[0].items()}
    stages[0].before_write()
    with torch.no_grad():
        for parameter in parameters[0].values():
            parameter.add_(1.0)
    later = stages[0].forward(1, texts[1], start=0, end=1, tokens=texts[1].numel())
    assert not torch.allclose(later, held(0, 1)[0].forward(1, texts[1], start=0, end=1, tokens=1)), "moved weights"
    _, gradient = stages[1].loss(0, values, texts[0], start=1, end=3)
    stages[0].backward(0, gradient)
    stages[0].commit(0)
    gradients, count = stages[0].take(0)
    for name, found in gradients.items():
        torch.testing.assert_close(found * count, wanted[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(parameters[0][name], before[name] + 1.0), "and the working weights are the moved ones"


def test_weights_are_not_copied_where_no_graph_needs_them() -> None:
    stage, parameters = held(0, 3)
    tokens = microbatches(1, seed=6)[0]
    places = {name: p.data_ptr() for name, p in parameters.items()}
    stage.before_write()
    stage.loss(0, tokens, tokens, start=0, end=3)
    stage.before_write()
    assert {name: p.data_ptr() for name, p in parameters.items()} == places
    stage.forward(1, tokens, start=0, end=2, tokens=tokens.numel())
    stage.forget(1)
    stage.before_write()
    assert {name: p.data_ptr() for name, p in parameters.items()} == places
    stage.forward(2, tokens, start=0, end=2, tokens=tokens.numel())
    stage.before_write()
    assert {p.data_ptr() for p in parameters.values()}.isdisjoint(places.values())


def test_what_is_forgotten_leaves_nothing() -> None:
    stage, _ = held(0, 3)
    tokens = microbatches(1, seed=7)[0]
    stage.loss("done", tokens, tokens, start=0, end=3)
    stage.forward("half", tokens, start=0, end=1, tokens=tokens.numel())
    assert stage.in_flight == 2
    for key in ("done", "half", "never"):
        stage.forget(key)
    assert stage.in_flight == 0 and stage.tokens(0) == 0 and stage.take(0) == ({}, 0)
    with pytest.raises(KeyError):
        stage.commit("done")


def test_a_loss_alone_keeps_nothing_and_is_the_same() -> None:
    stage, parameters = held(0, 3)
    tokens = microbatches(1, seed=8)[0]
    loss, gradient = stage.loss(0, tokens, tokens, start=0, end=3, keep=False)
    assert gradient is None and stage.in_flight == 0
    assert stage.loss(1, tokens, tokens, start=0, end=3)[0] == loss == in_one_process(NUM, [tokens])[1][0]
    stage.forward(2, tokens, start=0, end=1, tokens=1, keep=False)
    assert stage.in_flight == 1 and all(p.grad is None for p in parameters.values())


def test_the_mean_is_by_tokens() -> None:
    stage, _ = held(0, 3)
    texts = [*microbatches(1, seed=9, sequences=1), *microbatches(1, seed=10, sequences=4)]
    wanted, _ = in_one_process(NUM, texts)
    for key, tokens in enumerate(texts):
        stage.loss(key, tokens, tokens, start=0, end=3)
        stage.commit(key)
    gradients, count = stage.take(2)
    assert count == sum(tokens.numel() for tokens in texts)
    for name, values in gradients.items():
        torch.testing.assert_close(values, wanted[name] / count, rtol=1e-5, atol=1e-7)
    assert stage.tokens(2) == 0 and stage.tokens(1) == count


def test_logits_are_of_the_last_positions_and_keep_nothing() -> None:
    stage, parameters = held(0, 3)
    tokens = microbatches(1, seed=11, sequences=3)[0]
    with torch.no_grad():
        wanted = Toy(NUM)(tokens, start=0, end=NUM)
    for positions in (1, 2, tokens.shape[1]):
        found = stage.logits(tokens, start=0, end=NUM, positions=positions)
        assert torch.equal(found, wanted[:, -positions:])
    assert stage.in_flight == 0 and all(p.grad is None for p in parameters.values())


class Noisy(Toy):
    """With dropout of what comes in."""

    def forward(self, values: torch.Tensor, *, start: int, end: int) -> torch.Tensor:
        entered = torch.nn.functional.dropout(values, 0.5, self.training) if start else values
        return super().forward(entered, start=start, end=end)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_left_out_where_nothing_is_learnt(training: bool) -> None:
    stage = Noisy(NUM)
    stage.train(training)
    compute = StageCompute(stage, fragments_of(NUM), dict(stage.model.named_parameters()))  # type: ignore[arg-type]
    tokens = microbatches(1, seed=12)[0]
    values = compute.forward(0, tokens, start=0, end=1, tokens=tokens.numel(), keep=False)
    losses = [compute.loss(0, values, tokens, start=1, end=NUM, keep=False)[0] for _ in range(2)]
    logits = [compute.logits(values, start=1, end=NUM, positions=1) for _ in range(2)]
    assert losses[0] == losses[1] and torch.equal(logits[0], logits[1])
    assert stage.training is stage.model.training is training, "and is back where something is"
    trained = [compute.loss(key, values, tokens, start=1, end=NUM)[0] for key in (1, 2)]
    assert (trained[0] != trained[1]) is training


def test_the_stage_may_be_exchanged_while_microbatches_are_under_way() -> None:
    """What was begun before ends with the weights it began with, and counts; a fragment that is not served any more is
    refused, and its gradients wait to be taken."""
    tokens = microbatches(2, seed=8)
    wanted, _ = in_one_process(NUM, tokens[:1])
    compute, parameters = held(0, 3)
    compute.loss("old", tokens[0], tokens[0], start=0, end=3)
    under_way = compute.forward("half", tokens[1], start=0, end=2, tokens=12)
    smaller = Toy(NUM)
    smaller.start, smaller.end = 1, 3
    compute.restage(smaller)  # type: ignore[arg-type]
    compute.before_write()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    compute.commit("old")
    for fragment in range(3):
        gradients, count = compute.take(fragment)
        assert count == tokens[0].numel()
        for name, values in gradients.items():
            torch.testing.assert_close(values * count, wanted[name], rtol=1e-5, atol=1e-5)
    assert compute.backward("half", torch.ones_like(under_way)) is None
    with pytest.raises(PeerRefused, match="not served here any more"):
        compute.forward("new", tokens[1], start=0, end=2, tokens=12)
    assert torch.equal(compute.forward("new", under_way, start=1, end=2, tokens=12), under_way), "zero weights now"


def test_what_was_let_go_of_counts_for_nothing() -> None:
    tokens = microbatches(1, seed=9)[0]
    compute, _ = held(0, 3)
    compute.loss("late", tokens, tokens, start=0, end=3)
    del compute.fragments[0]
    compute.commit("late")
    assert [compute.tokens(f) for f in range(3)] == [0, tokens.numel(), tokens.numel()]


def test_writing_moves_the_weights_of_every_stage_that_still_needs_them() -> None:
    """Two exchanges with a graph under way on each stage."""
    tokens = microbatches(3, seed=10)
    wanted, _ = in_one_process(NUM, tokens)
    compute, parameters = held(0, 3)
    for key, text in enumerate(tokens):
        values = compute.forward(f"{key}/0", text, start=0, end=2, tokens=text.numel())
        _, gradient = compute.loss(f"{key}/2", values, text, start=2, end=3)
        if key < 2:
            compute.restage(Toy(NUM))  # type: ignore[arg-type]
        tokens[key] = gradient  # type: ignore[call-overload]
    compute.before_write()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(7.0)
    for key, gradient in enumerate(tokens):
        compute.backward(f"{key}/0", gradient)
        compute.commit(f"{key}/0")
        compute.commit(f"{key}/2")
    for fragment in range(3):
        gradients, count = compute.take(fragment)
        for name, values in gradients.items():
            torch.testing.assert_close(values * count, wanted[name], rtol=1e-5, atol=1e-5)


def test_a_single_gradient_is_its_own_sum_and_several_add_up_in_fp32() -> None:
    stage, parameters = held(0, 3)
    texts = microbatches(3, seed=9)
    through([stage], 0, texts[0], [0, 3])
    own = {name: values.clone() for found in stage._pending[0].gradients.values() for name, values in found.items()}
    stage.commit(0)
    gradients, tokens = stage.take(1)
    assert tokens == texts[0].numel() and gradients
    for name, values in gradients.items():
        assert torch.equal(values, own[name])
    wanted, _ = in_one_process(NUM, texts)
    for key, text in enumerate(texts):
        through([stage], key, text, [0, 3])
        stage.commit(key)
    gradients, tokens = stage.take(1)
    for name, values in gradients.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values * tokens, wanted[name], rtol=1e-5, atol=1e-5)
    assert parameters


def test_a_write_to_one_fragment_copies_that_one_and_each_graph_keeps_its_own_weights() -> None:
    texts = microbatches(2, seed=10)
    stage, parameters = held(0, 2)
    last = held(2, 3)[0]
    values = [stage.forward(0, texts[0], start=0, end=2, tokens=texts[0].numel())]
    places = {name: p.data_ptr() for name, p in parameters.items()}
    stage.before_write(1)
    changed = {name for name, p in parameters.items() if p.data_ptr() != places[name]}
    assert changed == {tensor.name for tensor in stage.fragments[1].tensors}
    with torch.no_grad():
        for name in changed:
            parameters[name].mul_(1.5)
    # the first graph still needs fragment 0 as it is, though a newer one is built on other weights of fragment 1
    values.append(stage.forward(1, texts[1], start=0, end=2, tokens=texts[1].numel()))
    stage.before_write(0)
    with torch.no_grad():
        for tensor in stage.fragments[0].tensors:
            parameters[tensor.name].zero_()
    fresh, fresh_parameters = held(0, 2)
    for key in (0, 1):
        if key == 1:
            with torch.no_grad():
                for name in changed:
                    fresh_parameters[name].mul_(1.5)
        again = fresh.forward(key, texts[key], start=0, end=2, tokens=texts[key].numel())
        assert torch.equal(again, values[key])
        _, gradient = last.loss(key, again, texts[key], start=2, end=3)
        fresh.backward(key, gradient)
        stage.backward(key, gradient)
        for fragment in (0, 1):
            for name, wanted in fresh._pending[key].gradients[fragment].items():
                torch.testing.assert_close(stage._pending[key].gradients[fragment][name], wanted)


def test_a_fragment_that_is_not_held_is_written_without_a_word() -> None:
    stage, _ = held(0, 1)
    text = microbatches(1, seed=11)[0]
    stage.forward(0, text, start=0, end=1, tokens=text.numel())
    stage.before_write(2)
    assert stage.in_flight == 1


def test_weights_in_bfloat16_take_and_give_hidden_states_in_fp32() -> None:
    texts = microbatches(1, seed=12)
    whole, parameters = held(0, 3)
    working.halve(parameters.values())
    halves = StageCompute(whole._stage, whole.fragments, parameters)
    values = halves.forward(0, texts[0], start=0, end=2, tokens=texts[0].numel())
    assert values.dtype == torch.float32
    loss, gradient = halves.loss(1, values, texts[0], start=2, end=3)
    assert gradient is not None and gradient.dtype == torch.float32
    halves.backward(0, gradient)
    exact = in_one_process(NUM, texts)[1][0]
    assert loss == pytest.approx(exact, rel=0.02)
    assert {g.dtype for g in halves._pending[0].gradients[1].values()} == {torch.bfloat16}
