"""Plain data becomes dataclasses; whatever does not fit is an error that names its key, however deep it lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from swarm.config_reader import build, convert, has_text_keys, shown
from swarm.errors import ConfigError


@dataclass(frozen=True)
class Leaf:
    size: int
    share: float = 1.0


@dataclass(frozen=True)
class Tree:
    name: str
    one: Leaf | None = None
    by_name: dict[str, Leaf] = field(default_factory=dict)
    in_order: list[Leaf] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    pair: tuple[float, float] = (0.0, 1.0)
    words: list[str] = field(default_factory=list)


def read(document):
    return build(Tree, {"name": "t", **document}, origin="t.yaml", at="")


def test_dataclasses_lie_in_dataclasses_dicts_and_lists():
    tree = read({
        "one": {"size": 1}, "by_name": {"a": {"size": 2, "share": 3}}, "in_order": [{"size": 4}, {"size": 5}],
        "shares": {"a": 1}, "anything": {"x": [1, {"y": None}]}, "pair": [1, 2], "words": ["w"],
    })  # fmt: skip
    assert tree == Tree(
        "t", Leaf(1), {"a": Leaf(2, 3.0)}, [Leaf(4), Leaf(5)], {"a": 1.0}, {"x": [1, {"y": None}]}, (1.0, 2.0), ["w"]
    )
    assert type(tree.shares["a"]) is float, "1 and 1.0 must make the same run"
    assert read({"one": None}).one is None


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"by_name": {"a": {"siz": 2}}}, "unknown key 'by_name.a.siz'"),
        ({"by_name": {"a": {}}}, "missing key 'by_name.a.size'"),
        ({"by_name": {"a": {"size": "x"}}}, "by_name.a.size must be int"),
        ({"by_name": {1: {"size": 2}}}, "every key in by_name must be text"),
        ({"by_name": [1]}, "by_name must be dict"),
        ({"in_order": [{"size": 1}, {"size": True}]}, "in_order[1].size must be int"),
        ({"in_order": [3]}, "in_order[0] must be keys and values"),
        ({"shares": {"a": "x"}}, "shares.a must be float"),
        ({"shares": {"a": float("nan")}}, "shares.a must be float"),
        ({"words": [3]}, "words must be str"),
        ({"pair": [1]}, "pair must be tuple"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(document, says):
    with pytest.raises(ConfigError) as caught:
        read(document)
    assert says in str(caught.value) and str(caught.value).startswith("t.yaml: ")


def test_a_document_must_be_keys_and_values():
    with pytest.raises(ConfigError, match="top level must be keys and values"):
        build(Tree, ["name"], origin="t.yaml", at="")


def test_numbers_pass_one_way_only():
    assert convert(float, 1, origin="o", at="x") == 1.0
    for value in (1.0, True, "1", 10**400):
        if value == 10**400:
            with pytest.raises(ConfigError, match="x must be float"):
                convert(float, value, origin="o", at="x")
        else:
            with pytest.raises(ConfigError, match="x must be int"):
                convert(int, value, origin="o", at="x")


def test_what_is_shown_is_short():
    assert len(shown("x" * 1000)) == 200 and shown(10**5000) == "something too long to show"


def test_keys_that_json_would_rename_are_seen():
    assert has_text_keys({"a": [{"b": 1}]}) and not has_text_keys({"a": [{1: 1}]})
