"""The memory plan: every row by hand, the sum against real tensors, and how many fragments fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.errors import ConfigError
from swarm.host.keep import AMPLE, LITTLE
from swarm.host.memory import (
    CUDA_BYTES,
    EIGHT_BIT_BYTES,
    PROGRAM_BYTES,
    PartSize,
    Row,
    StagePlan,
    Work,
    activation_bytes,
    check_fits,
    fragments_that_fit,
    plan_stage,
)
from swarm.model import working
from swarm.model.prefix import model_inputs

MILLION = PartSize(1_000_000, num_blocks=2)
WORK = Work(hidden_size=100, num_heads=4, sequence_length=10, microbatch_sequences=2, microbatches_in_flight=3)
ROOM = 10**12


def rows(size: PartSize = MILLION, **changes: object) -> dict[str, int]:
    plan = plan_stage(size, dataclasses.replace(WORK, **changes), main_limit_bytes=ROOM, gpu_limit_bytes=ROOM)
    return {row.what: row.num_bytes for row in plan.rows}


def test_each_row_by_hand() -> None:
    """A stage of one fragment, of 1 M parameters; all that a byte each makes 1 MB."""
    assert rows() == {
        "program": PROGRAM_BYTES,
        "weights (1M parameters)": 4_000_000,
        "AdamW": 8_000_000,
        "activations of 3 x 2 x 10 tokens": 3 * 2 * (2 * 10) * (50 * 100 + 3 * 4 * 10) * 4,
        "gradients of 3 that wait for a verdict": 3 * 4_000_000,
        "sums of gradients": 4_000_000,
        "weights of graphs under way": 4_000_000,
        "global weights and momentum": 8_000_000,
        "older versions": 5 * 8_000_000 + 6_000_000,
        "error feedback": 2_000_000,
        "own contributions": 2 * 32 * 1024 * 1024 // 2,
        "results of rounds": 512 * 1024 * 1024,
        "1 round under way": 30_000_000,
        "a checkpoint being written": 16_000_000,
    }


def test_with_as_few_bytes_as_can_be() -> None:
    work = {"halved": True, "optimizer_bits": 8, "keep": LITTLE, "microbatches_in_flight": 1, "pieces": 1, "buffers": 0}
    assert rows(**work) == {
        "program": PROGRAM_BYTES + EIGHT_BIT_BYTES,
        "weights (1M parameters, bfloat16 and 8 further bits)": 3_000_000,
        "AdamW, 8-bit": 2_000_000 + 8 * 3907,
        "activations of 1 x 2 x 10 tokens": 2 * (2 * 10) * (50 * 100 * 2 + 3 * 4 * 10 * 4),
        "gradients of 1 that wait for a verdict": 2_000_000,
        "weights of graphs under way": 4_000_000,
        "global weights": 4_000_000,
        "error feedback": 2_000_000,
        "own contributions": 1024 * 1024,
        "results of rounds": 16 * 1024 * 1024,
        "1 round under way": 26_000_000,
        "a checkpoint being written": 8_000_000,
    }


def test_what_changes_a_row() -> None:
    assert "error feedback" not in rows(bits=32)
    assert rows(bits=32)["own contributions"] == 8 * rows()["own contributions"]
    assert rows(optimizer_bits=8)["AdamW, 8-bit"] == 2_000_000 + 8 * 3907
    small = activation_bytes(MILLION, dataclasses.replace(WORK, microbatch_sequences=1))
    assert 2 * small == activation_bytes(MILLION, WORK)
    head = dataclasses.replace(MILLION, logits=5000)
    assert activation_bytes(head, WORK) - activation_bytes(MILLION, WORK) == 20 * 5000 * 3 * 4
    more = dataclasses.replace(WORK, microbatches_in_flight=4)
    assert activation_bytes(head, more) - activation_bytes(head, WORK) == 2 * 20 * 5120 * 4, "but no more logits"


def test_steps_that_are_taken_while_graphs_are_under_way_leave_old_weights() -> None:
    old = [rows(microbatches_in_flight=k)["weights of graphs under way"] for k in (2, 4, 5, 8, 9)]
    assert old == [4_000_000, 4_000_000, 8_000_000, 8_000_000, 12_000_000]
    two = PartSize(700_000, 1) + PartSize(300_000, 1)
    assert rows(two, microbatches_in_flight=1)["weights of graphs under way"] == 2 * 700_000 * 4, "rounds only"


def test_a_whole_model_has_a_batch_of_its_own_and_does_others_work_if_there_is_room() -> None:
    alone = rows(batch_sequences=8, microbatches_in_flight=0)
    assert alone["gradients"] == 4_000_000 and "sums of gradients" not in alone
    assert alone["activations"] == 8 * (2 * 10) * (50 * 100 + 3 * 4 * 10) * 4
    helping = rows(batch_sequences=8, microbatches_in_flight=2)
    assert helping["activations"] == (8 + 2 * 2) * (2 * 10) * (50 * 100 + 3 * 4 * 10) * 4
    assert helping["gradients of 2 that wait for a verdict"] == 8_000_000
    head = dataclasses.replace(MILLION, logits=100)
    work = dataclasses.replace(WORK, batch_sequences=8)
    assert activation_bytes(head, work) - activation_bytes(MILLION, work) == 8 * 10 * 3 * 100 * 4, "one at a time"


def test_a_sync_run_has_no_inner_optimizer_and_averages_gradients_of_all_fragments_at_once() -> None:
    four = sum([PartSize(250_000, 1)] * 3, PartSize(250_000, 1))
    found = rows(four, sync=True, bits=32, buffers=2)
    assert "AdamW" not in found and found["gradients until a round"] == 8_000_000
    assert found["4 rounds under way"] == 1_000_000 * (26 + 8)
    assert rows(sync=True, optimizer_bits=8)["program"] == PROGRAM_BYTES, "which does not load bitsandbytes"


def test_rounds_at_a_time_are_of_the_largest_fragments() -> None:
    parts = PartSize(1_000_000, 1) + PartSize(3_000_000, 1) + PartSize(2_000_000, 1)
    assert (parts.num_fragments, parts.largest_fragment) == (3, 3_000_000)
    assert rows(parts)["3 rounds under way"] == 3 * 3_000_000 * 30
    assert rows(parts, keep=LITTLE)["1 round under way"] == 3_000_000 * 30
    assert rows(parts)["a checkpoint being written"] == 2 * 3_000_000 * 8


def test_without_a_gpu_all_is_in_main_memory() -> None:
    plan = plan_stage(MILLION, WORK, main_limit_bytes=ROOM)
    assert plan.gpu_bytes == 0 and plan.fits
    assert plan.main_bytes == plan.total_bytes == sum(row.num_bytes for row in plan.rows)


def test_on_a_gpu_the_two_memories_are_counted_apart() -> None:
    work = dataclasses.replace(WORK, on_gpu=True)
    activations = activation_bytes(MILLION, WORK)
    gpu = 4_000_000 * (1 + 2 + 3 + 1 + 1) + activations
    main = sum(rows().values()) - gpu + CUDA_BYTES  # its libraries are in main memory
    plan = plan_stage(MILLION, work, main_limit_bytes=main, gpu_limit_bytes=gpu)
    assert (plan.main_bytes, plan.gpu_bytes, plan.fits) == (main, gpu, True)
    assert not plan_stage(MILLION, work, main_limit_bytes=main - 1, gpu_limit_bytes=gpu).fits
    assert not plan_stage(MILLION, work, main_limit_bytes=main, gpu_limit_bytes=gpu - 1).fits


def test_the_table_has_a_line_a_row_and_says_what_is_too_little() -> None:
    plan = StagePlan((Row("weights", 4_000_000, True), Row("global weights", 12_345_678, False)), 20_000_000, 3_000_000)
    assert plan.table().splitlines() == [
        "weights (GPU)      4 MB",
        "global weights  12.3 MB",
        "main memory     12.3 MB  of 20 MB",
        "GPU memory         4 MB  of 3 MB: too little",
    ]
    text = plan_stage(MILLION, WORK, main_limit_bytes=10**6).table()
    assert "GPU" not in text and text.endswith("of 1 MB: too little")
    assert len(text.splitlines()) == len(rows()) + 1


def test_a_plan_that_does_not_fit_is_an_error_with_the_table_and_ways_out() -> None:
    check_fits(plan_stage(MILLION, WORK, main_limit_bytes=ROOM))
    plan = plan_stage(MILLION, WORK, main_limit_bytes=10**8)
    with pytest.raises(ConfigError, match="do not fit") as caught:
        check_fits(plan)
    assert plan.table() in caught.value.why
    assert "--fragments" in caught.value.do and "--max-memory" in caught.value.do


def test_masks_of_packed_rows_are_of_length_squared() -> None:
    """One a row of each graph, in the type of hidden states; and three bytes a pair of those that are being made."""
    assert rows(masked=True) == {**rows(), "attention masks": (3 * 2 * 4 + 2 * 3) * 10**2}
    assert rows(masked=True, halved=True)["attention masks"] == (3 * 2 * 2 + 2 * 3) * 10**2
    assert rows(masked=True, at_once=1)["attention masks"] == (4 + 3) * 10**2, "a graph of one sequence at a time"
    alone = {"batch_sequences": 8, "microbatches_in_flight": 0}
    assert rows(masked=True, **alone)["attention masks"] == 8 * (4 + 3) * 10**2
    helping = rows(masked=True, batch_sequences=8, microbatches_in_flight=2)["attention masks"]
    assert helping == ((8 + 2 * 2) * 4 + 8 * 3) * 10**2
    one = rows(masked=True, sequence_length=2048, microbatch_sequences=1, microbatches_in_flight=1)["attention masks"]
    assert one == 7 * 2048**2, "17 MB the mask, and 13 MB while it is made"


def test_a_spare_copy_takes_its_state_twice_and_a_result_for_a_moment() -> None:
    assert "a spare copy that follows a round" not in rows()
    assert rows(spare_values=1_000_000)["a spare copy that follows a round"] == (2 * 8 + 9) * 1_000_000
    assert rows(spare_values=1_000_000, buffers=0)["a spare copy that follows a round"] == (2 * 4 + 9) * 1_000_000
    on_gpu = plan_stage(
        MILLION, dataclasses.replace(WORK, on_gpu=True, spare_values=10, masked=True), main_limit_bytes=ROOM
    )
    assert [(row.on_gpu, row.shared) for row in on_gpu.rows if "spare" in row.what] == [(False, True)]
    assert [(row.on_gpu, row.shared) for row in on_gpu.rows if "masks" in row.what] == [(True, True)]


# --- how many fit

FRAGMENTS = [PartSize(3_000_000, 1), PartSize(1_000_000, 1), PartSize(1_000_000, 1), PartSize(2_000_000, 1, 50_000)]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_as_many_fit_as_the_plan_of_their_sum_says(start: int, on_gpu: bool) -> None:
    work = dataclasses.replace(WORK, on_gpu=on_gpu)
    most = len(FRAGMENTS) - start
    needed = []
    for count in range(1, most + 1):
        size = sum(FRAGMENTS[start + 1 : start + count], FRAGMENTS[start])
        plan = plan_stage(size, work, main_limit_bytes=ROOM, gpu_limit_bytes=ROOM)
        needed.append((plan.main_bytes, plan.gpu_bytes))
    for count, (main, gpu) in enumerate(needed, start=1):
        limits = {"start": start, "main_limit_bytes": main, "gpu_limit_bytes": gpu}
        assert fragments_that_fit(FRAGMENTS, work, **limits) == count
        assert fragments_that_fit(FRAGMENTS, work, **{**limits, "main_limit_bytes": main - 1}) == count - 1
    assert fragments_that_fit(FRAGMENTS, work, start=start, main_limit_bytes=ROOM, gpu_limit_bytes=ROOM) == most


def test_nothing_fits_into_nothing() -> None:
    assert fragments_that_fit(FRAGMENTS, WORK, main_limit_bytes=PROGRAM_BYTES) == 0
    assert fragments_that_fit([], WORK, main_limit_bytes=ROOM) == 0


def test_gpt_j_on_a_laptop() -> None:
    """28 blocks of 201 M parameters: what fits in 8 and in 16 GB, with as few bytes as can be."""
    block = PartSize(201_000_000, 1)
    light = Work(
        hidden_size=4096, num_heads=16, sequence_length=512, keep=LITTLE, halved=True, optimizer_bits=8,
        microbatches_in_flight=1,
    )
    exact = dataclasses.replace(light, halved=False, optimizer_bits=32, keep=AMPLE)
    fits = [[fragments_that_fit([block] * 26, work, main_limit_bytes=limit * 10**9) for limit in (8, 16, 32, 64)]
            for work in (exact, light)]  # fmt: skip
    assert fits[1][0] == 0 and fits[1][1] == 1
    assert fits[0][:3] == [0, 0, 1] and all(few <= many for few, many in zip(*fits, strict=True))
    assert fits[1][3] >= 8


# --- against real models

REAL = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(("dropout", "halved"), [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
@pytest.mark.parametrize("name", ["gptj", "gpt2", "gpt_neox", "llama", "qwen3", "opt"])
def test_a_block_keeps_no_more_activations_than_planned(name: str, dropout: float, halved: bool) -> None:
    """What autograd saves, counted: the plan is an upper bound, and not five times too much."""

    def saved_bytes(num_blocks: int) -> int:
        config = AutoConfig.for_model(name, pad_token_id=0, num_hidden_layers=num_blocks, **REAL)
        wide = {"intermediate_size": 256, "ffn_dim": 256, "rotary_dim": 8, "num_key_value_heads": 4, "head_dim": 16}
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "dropout"), dropout)
        for key, value in (wide | rates).items():
            if hasattr(config, key) and not (key == "head_dim" and name != "qwen3"):
                setattr(config, key, value)
        model = AutoModelForCausalLM.from_config(config).train()
        if halved:
            working.halve(model.parameters())
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=torch.ones(2, 32, dtype=torch.long), use_cache=False).logits
        assert logits.requires_grad
        return sum(storage.nbytes() for storage in kept.values())

    measured = (saved_bytes(3) - saved_bytes(1)) // 2
    work = Work(hidden_size=64, num_heads=4, sequence_length=32, microbatch_sequences=2, halved=halved)
    planned = activation_bytes(PartSize(0, num_blocks=1), work)
    assert 0.15 * planned < measured <= planned


@pytest.mark.parametrize(("name", "attention"), [("gptj", "eager"), ("llama", "eager"), ("llama", "sdpa")])
@pytest.mark.parametrize("halved", [False, True])
def test_masks_take_no_more_than_planned(name: str, attention: str, halved: bool) -> None:
    """What a graph over packed rows keeps beyond that of plain ones: the mask at most, once for all blocks."""
    sizes = {"n_inner": 64, "intermediate_size": 64, "num_key_value_heads": 4, "rotary_dim": 8}
    config = AutoConfig.for_model(name, num_hidden_layers=2, **{**REAL, **sizes}, attn_implementation=attention)
    model = AutoModelForCausalLM.from_config(config).train()
    if halved:
        working.halve(model.parameters())

    def kept_bytes(**how: torch.Tensor) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=torch.ones(2, 128, dtype=torch.long), use_cache=False, **how).logits
        assert logits.requires_grad
        return sum(storage.nbytes() for storage in kept.values())

    segments = [[(3, 100), (2, 28)], [(0, 128)]]
    how = model_inputs(model, segments)
    work = Work(
        hidden_size=64, num_heads=4, sequence_length=128, microbatch_sequences=2, halved=halved, masked=True
    )
    plan = plan_stage(PartSize(0, 2), work, main_limit_bytes=ROOM)
    [planned] = [row.num_bytes for row in plan.rows if row.what == "attention masks"]
    assert how["attention_mask"].nbytes == 2 * 128**2 * (2 if halved else 4) < planned
    assert kept_bytes(**how) <= kept_bytes() + planned


# --- blocks that are computed again, and a frozen base


def test_of_a_block_that_is_computed_again_only_what_came_in_is_kept() -> None:
    plain, again = rows(), rows(recompute=True)
    tokens, a_value = 3 * 2 * 10, 4
    assert again["activations of 3 x 2 x 10 tokens"] == tokens * 2 * 100 * a_value
    assert again["a block that is computed again"] == 2 * 10 * (50 * 100 + 3 * 4 * 10) * a_value
    changed = {"activations of 3 x 2 x 10 tokens", "a block that is computed again"}
    assert {name: size for name, size in again.items() if name not in changed} == {
        name: size for name, size in plain.items() if name not in changed
    }


def test_one_sequence_at_once_keeps_one_graph_and_what_came_in() -> None:
    """A microbatch in pieces (pipeline/compute.py): no graph lives between its forward and its backward."""
    [kept] = [size for name, size in rows(at_once=1).items() if name.startswith("activations")]
    assert kept == 10 * 2 * (50 * 100 + 3 * 4 * 10) * 4 + 3 * 2 * 10 * 100 * 4
    assert rows(at_once=2) == rows(), "a microbatch has two"


def test_a_whole_models_batch_in_pieces_has_a_graph_of_one_piece() -> None:
    whole = {"microbatches_in_flight": 0, "batch_sequences": 8}
    assert rows(**whole)["activations"] == 8 * rows(**whole, at_once=1)["activations"]


def test_logits_are_there_for_as_many_sequences_as_are_computed_at_once() -> None:
    last = dataclasses.replace(MILLION, logits=1000)
    for at_once, sequences in ((0, 2), (1, 1)):
        work = dataclasses.replace(WORK, at_once=at_once, recompute=True)
        more = activation_bytes(last, work) - activation_bytes(MILLION, work)
        assert more == sequences * 10 * 3 * 1000 * 4


def test_rows_of_a_frozen_base() -> None:
    """What is trained is counted as ever; the base takes its own bytes, and a matrix at a time becomes values."""
    base = dataclasses.replace(MILLION, base_bytes=5_000_000, base_values=300_000, largest_matrix=70_000)
    found, plain = rows(base), rows()
    assert found.pop("frozen base") == 5_000_000 + 4 * 300_000
    assert found.pop("values of a frozen matrix") == 4 * 70_000
    assert found == plain
    assert rows(base, halved=True)["frozen base"] == 5_000_000 + 2 * 300_000


def test_a_frozen_base_adds_up_over_fragments_and_its_largest_matrix_does_not() -> None:
    one = PartSize(10, 1, base_bytes=100, base_values=7, largest_matrix=30)
    both = one + PartSize(20, 2, base_bytes=50, base_values=3, largest_matrix=40)
    assert (both.base_bytes, both.base_values, both.largest_matrix) == (150, 10, 40)


def test_what_is_there_once_is_marked_so() -> None:
    work = dataclasses.replace(WORK, recompute=True, on_gpu=True)
    size = dataclasses.replace(MILLION, base_bytes=1000, largest_matrix=10)
    plan = plan_stage(size, work, main_limit_bytes=ROOM, gpu_limit_bytes=ROOM)
    shared = {row.what for row in plan.rows if row.shared and row.on_gpu}
    assert shared == {"values of a frozen matrix", "a block that is computed again"}
