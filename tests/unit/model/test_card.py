"""The model card says what the run was, whom it thanks, and how to use it; strangers' words stay harmless in it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.config import DataConfig, ModelConfig, RunConfig, canonical_json
from swarm.errors import ConfigError, HomeError
from swarm.model.card import BEGIN, END, FILE, Facts, add_evaluation, card, tokens_by_phase

RUN = RunConfig(
    name="gpt-jt", model=ModelConfig(source="EleutherAI/gpt-j-6b", revision="abc"), data=DataConfig(hub="some/text"),
    fragments=2,
)
PHASES = [(1000, "ul2r", {"pile": 1.0}), (None, "prefix", {"cot": 0.05, "p3": 0.2, "ni": 0.2, "pile": 0.55})]
HEADS = [(7, 1500, "a" * 64), (8, 1600, "b" * 64)]


def facts(**changes: object) -> Facts:
    values: dict[str, object] = {
        "run": RUN, "parameters": 6_053_381_344, "tokens": 1500, "phases": PHASES, "heads": HEADS,
        "names": ["Ada", "Grace"], "datasets": ["some/text", "bigscience/P3"],
    }
    return Facts(**{**values, **changes})  # type: ignore[arg-type]


def front_matter(text: str) -> dict[str, object]:
    _, head, _ = text.split("---\n", 2)
    found = yaml.safe_load(head)
    assert isinstance(found, dict)
    return found


def test_the_hub_can_read_its_beginning() -> None:
    head = front_matter(card(facts(prefix=True)))
    assert head == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["swarm", "prefix-lm"],
        "base_model": "EleutherAI/gpt-j-6b", "datasets": ["bigscience/P3", "some/text"],
    }
    alone = RunConfig(name="x", model=ModelConfig(config={"model_type": "gptj"}), data=DataConfig(stdlib=True))
    assert front_matter(card(facts(run=alone, datasets=[]))).keys() == {"library_name", "pipeline_tag", "tags"}


def test_it_states_the_run_config_tokens_people_and_digests() -> None:
    text = card(facts())
    assert RUN.run_id in text and "6,053,381,344 parameters" in text and "1,500 tokens" in text
    config = text.split("```json\n")[1].split("\n```")[0]
    assert json.loads(config) == json.loads(canonical_json(RUN)), "nobody has to look for it elsewhere"
    for row in ("| 1 | ul2r | pile | 1,000 |", "| 2 | prefix | cot | 25 |", "| 2 | prefix | pile | 275 |"):
        assert row in text
    assert "`Ada`, `Grace`" in text
    assert f"| 0 | 7 | 1,500 | `{'a' * 64}` |" in text and f"| 1 | 8 | 1,600 | `{'b' * 64}` |" in text


def example(text: str) -> str:
    return text.split("```python\n")[1].split("\n```")[0]


def test_the_example_is_python_and_says_how_prompts_are_read() -> None:
    plain, prefixed = example(card(facts())), example(card(facts(prefix=True, mark=[50257])))
    for code in (plain, prefixed):
        ast.parse(code)
    assert "is_causal" not in plain and "import torch" not in plain
    assert "model.config.is_causal = False" in prefixed and "torch.tensor([[50257]])" in prefixed
    assert "Never take the likelihood" in card(facts(prefix=True))
    assert "Never take the likelihood" not in card(facts())


@pytest.mark.parametrize(("tokens", "wanted"), [
    (0, [("ul2r", 0, {"pile": 0})]),
    (999, [("ul2r", 999, {"pile": 999})]),
    (1000, [("ul2r", 1000, {"pile": 1000})]),
    (1200, [("ul2r", 1000, {"pile": 1000}), ("prefix", 200, {"cot": 10, "p3": 40, "ni": 40, "pile": 110})]),
])
def test_tokens_of_each_source_follow_from_the_phases(tokens: int, wanted: list[object]) -> None:
    assert tokens_by_phase(PHASES, tokens) == wanted


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 10**7))
@settings(max_examples=40, deadline=None)
def test_no_token_is_counted_twice(drawn: list[tuple[int, int]], tokens: int) -> None:
    phases = [(lasts, "causal", {str(n): 1 / count for n in range(count)}) for lasts, count in drawn]
    found = tokens_by_phase(phases, tokens)
    assert sum(here for _, here, _ in found) == min(tokens, sum(lasts for lasts, _ in drawn))
    for _, here, sources in found:
        assert sum(sources.values()) == pytest.approx(here, abs=len(sources))


def test_nobody_is_thanked_where_nobody_is_known() -> None:
    assert "Nobody who gave a name" in card(facts(names=[]))


@pytest.mark.parametrize("name", ["x`](http://evil) <script>", "a\n# Title", "pipe|cell", "\x1b[2J", "z" * 300])
def test_names_are_harmless(name: str) -> None:
    line = next(line for line in card(facts(names=[name])).splitlines() if line.startswith("Those who gave"))
    shown = line.removeprefix("Those who gave a name: ").removesuffix(".")
    assert shown[0] == shown[-1] == "`" and not set("`|<>[]") & set(shown[1:-1]) and line.isprintable()
    assert len(shown) < 50


def test_words_of_the_run_config_cannot_leave_their_block() -> None:
    run = RunConfig(name="x", model=ModelConfig(config={"model_type": "a\n```\n# Evil"}), data=DataConfig(stdlib=True))
    text = card(facts(run=run))
    assert "\n# Evil" not in text and json.loads(text.split("```json\n")[1].split("\n```")[0])


def test_an_evaluation_is_put_in_its_place_and_replaced(tmp_path: Path) -> None:
    before = card(facts())
    (tmp_path / FILE).write_text(before)
    for table in ("| a |", "| b |\n| c |"):
        add_evaluation(tmp_path, table)
        text = (tmp_path / FILE).read_text()
        assert text.split(BEGIN)[1].split(END)[0] == f"\n{table}\n"
        assert text.split(BEGIN)[0] == before.split(BEGIN)[0] and text.split(END)[1] == before.split(END)[1]


def test_a_card_that_is_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model card"):
        add_evaluation(tmp_path, "x")
    (tmp_path / FILE).write_text("my notes")
    with pytest.raises(ConfigError, match="no place for an evaluation"):
        add_evaluation(tmp_path, "x")
    assert (tmp_path / FILE).read_text() == "my notes"
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(HomeError, match="cannot write"):
        add_evaluation(tmp_path, "x")
