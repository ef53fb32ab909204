"""A fragment as one flat vector: everything has its place, once, and comes back from it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.averaging.layout import Layout, layout_of
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network.codec import BLOCK

fixed = settings(max_examples=60, derandomize=True, deadline=None)

shapes = st.lists(st.integers(1, 30), min_size=1, max_size=3).map(tuple)
fragments = st.lists(st.tuples(shapes, st.booleans()), min_size=1, max_size=8).map(
    lambda tensors: FragmentSpec(0, (0, 1), tuple(
        TensorSpec(f"t{i}", shape, fine) for i, (shape, fine) in enumerate(tensors)
    ))
)


def random_tensors(layout: Layout, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {slot.name: torch.randn(slot.shape, generator=generator) for slot in layout.slots}


@fixed
@given(fragments)
def test_slots_tile_the_fine_and_then_the_coarse_blocks(fragment: FragmentSpec) -> None:
    layout = layout_of(fragment)
    fine = {tensor.name: tensor.fine for tensor in fragment.tensors}
    edge = layout.num_fine_blocks * BLOCK
    at = {True: 0, False: edge}
    for slot in layout.slots:
        assert slot.start == at[fine[slot.name]], "slots follow each other without a gap"
        assert slot.numel == torch.Size(slot.shape).numel()
        at[fine[slot.name]] += slot.numel
    assert edge - BLOCK < at[True] <= edge and layout.numel - BLOCK < at[False] <= layout.numel
    assert sorted(slot.name for slot in layout.slots) == sorted(fine)
    assert layout.num_parameters == sum(torch.Size(t.shape).numel() for t in fragment.tensors)
    assert layout == layout_of(fragment), "everybody derives the same layout"


@fixed
@given(fragments)
def test_flatten_and_views_are_each_other_backwards(fragment: FragmentSpec) -> None:
    layout = layout_of(fragment)
    tensors = random_tensors(layout)
    flat = layout.flatten(tensors)
    assert flat.shape == (layout.numel,) and flat.dtype == torch.float32
    seen = dict(layout.views(flat))
    assert seen.keys() == tensors.keys()
    assert all(torch.equal(seen[name], tensors[name]) for name in tensors)
    used = torch.zeros(layout.numel, dtype=torch.bool)
    for slot in layout.slots:
        assert not used[slot.start:slot.start + slot.numel].any(), "no value lies in two slots"
        used[slot.start:slot.start + slot.numel] = True
    assert torch.count_nonzero(flat[~used]) == 0, "padding is zero"
    assert int(used.sum()) == layout.num_parameters


def test_flatten_copies_and_views_do_not(layout: Layout) -> None:
    tensors = random_tensors(layout)
    flat = layout.flatten(tensors)
    before = tensors["matrix"].clone()
    for _, view in layout.views(flat):
        view.fill_(3.0)
    assert torch.equal(tensors["matrix"], before)
    assert int((flat == 3.0).sum()) == layout.num_parameters


def test_flatten_takes_parameters_of_any_kind(layout: Layout) -> None:
    tensors = random_tensors(layout)
    exact = {name: values.bfloat16() for name, values in tensors.items()}
    parameters = {name: torch.nn.Parameter(values) for name, values in exact.items()}
    flat = layout.flatten(parameters)
    assert not flat.requires_grad
    assert all(torch.equal(view, exact[name].float()) for name, view in layout.views(flat))
    transposed = {**tensors, "matrix": torch.randn(15, 20).t()}
    assert torch.equal(dict(layout.views(layout.flatten(transposed)))["matrix"], transposed["matrix"])


@fixed
@given(fragments, st.data())
def test_fine_blocks_of_any_cut_into_parts_add_up(fragment: FragmentSpec, data: st.DataObject) -> None:
    layout = layout_of(fragment)
    inner = data.draw(st.lists(st.integers(0, layout.num_blocks), max_size=4))
    edges = sorted({0, layout.num_blocks, *inner})
    counts = [layout.fine_in(start, end) for start, end in zip(edges, edges[1:], strict=False)]
    assert sum(counts) == layout.num_fine_blocks
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(block < layout.num_fine_blocks for block in range(start, end))


def test_decay_applies_to_matrices_only(layout: Layout) -> None:
    mask = layout.decay_mask()
    views = dict(layout.views(mask))
    assert bool((views["matrix"] == 1).all())
    assert torch.count_nonzero(views["bias"]) == torch.count_nonzero(views["norm"]) == 0
    assert int(mask.sum()) == 300, "padding does not decay"


def test_the_layout_by_hand(layout: Layout) -> None:
    assert [(slot.name, slot.start, slot.numel) for slot in layout.slots] == [
        ("bias", 0, 10), ("norm", 10, 7), ("matrix", 256, 300),
    ]
    assert (layout.num_fine_blocks, layout.num_blocks, layout.numel) == (1, 3, 768)
    assert [layout.fine_in(0, 1), layout.fine_in(0, 3), layout.fine_in(1, 3), layout.fine_in(2, 2)] == [1, 1, 0, 0]
