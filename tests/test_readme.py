"""What the READMEs tell people to type can be typed: commands parse, files and links exist, the example run is one."""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from swarm import cli
from swarm.config import run_from_dict

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "swarm" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python -m swarm\.\w+|scripts/)[^`]*)`")
LINK = re.compile(r"\]\(([^)]+)\)")
WITH_PARSER = {
    "quickstart": "quickstart", "monitor.py": "monitor", "export.py": "export", "local_swarm.py": "local_swarm",
    "bench.py": "bench", "make_small_data.py": "make_small_data",
    "faults.py": "faults",
}  # fmt: skip

sys.path.insert(0, str(ROOT / "scripts"))  # as it is for a script that runs


def blocks(kind):
    return [text for path in READMES for found, text in BLOCK.findall(path.read_text()) if found == kind]


def commands():
    in_blocks = [line for text in blocks("sh") for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    in_text = [command for path in READMES for command in INLINE.findall(BLOCK.sub("", path.read_text()))]
    return sorted({*in_blocks, *in_text})


def links():
    return sorted({(path, link) for path in READMES for link in LINK.findall(BLOCK.sub("", path.read_text()))})


def parse(function, arguments):
    try:
        function(arguments)
    except SystemExit as end:  # --help and --print-config print and end; argparse ends with 2 at a mistake
        assert end.code == 0, f"{arguments} is refused"


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command, capsys):
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "swarm.peer"]:
        parse(lambda arguments: cli.parse(arguments, {}), words[3:])
        return
    if words[:2] == ["python", "-m"] and words[2].startswith("swarm."):
        parse(importlib.import_module(words[2]).make_parser().parse_args, words[3:])
        return
    if words[:2] == ["python", "scripts/wanlab"]:
        parse(importlib.import_module("wanlab.__main__").make_parser().parse_args, words[2:])
        return
    folder, _, name = words[0].partition("/")
    assert folder == "scripts", f"what is {command}?"
    path = ROOT / words[0]
    assert path.is_file() or (name == "" and path.is_dir()), f"there is no {words[0]}"
    assert not path.is_file() or os.access(path, os.X_OK), f"{words[0]} cannot be executed"
    if name in WITH_PARSER:
        if len(words) > 1 or name == "quickstart":
            parse(importlib.import_module(WITH_PARSER[name]).make_parser().parse_args, words[1:])
    elif path.suffix == ".py":
        pytest.fail(f"put {name} into WITH_PARSER")


def test_there_are_commands_to_check():
    assert len(commands()) > 12 and "scripts/quickstart" in commands()


def test_the_two_commands_come_first():
    lines = (ROOT / "README.md").read_text().splitlines()
    typed = [line for line in lines if line.startswith(("scripts/", "python -m"))]
    assert typed[0] == "scripts/quickstart" and typed[1].startswith("python -m swarm.peer --new-swarm")


@pytest.mark.parametrize(("path", "link"), links(), ids=lambda value: getattr(value, "name", value))
def test_every_relative_link_exists(path, link):
    if link.startswith("http"):
        return
    file, _, heading = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    assert target.exists() and target.is_relative_to(ROOT)
    if heading:
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_examples_are_run_configs():
    documents = [yaml.safe_load(text) for text in blocks("yaml")]
    wholes = [document for document in documents if "name" in document]
    assert [document["name"] for document in wholes] == ["letters", "tasks-and-text"]
    for document in documents:  # one without a name is a part
        run = run_from_dict({**wholes[0], **document}, origin="README.md") if document not in wholes else run_from_dict(
            document, origin="README.md"
        )
        assert run.run_id.startswith(f"{run.name}-")


def test_every_file_named_in_the_inner_readme_exists():
    text = (ROOT / "swarm" / "README.md").read_text()
    for name in re.findall(r"\b((?:\w+/)*\w+\.py)\b", text):
        places = [ROOT, ROOT / "swarm", ROOT / "swarm" / "averaging"]
        assert any((place / name).is_file() for place in places), f"there is no {name}"


def test_error_messages_in_the_table_are_ours():
    """Somebody who searches the README for the message must find it."""
    source = "\n".join(path.read_text() for path in (ROOT / "swarm").rglob("*.py"))
    plain = re.sub(r"\{[^{}]*\}", "...", source)
    table = (ROOT / "README.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    for row in table.splitlines():
        if row.startswith("|") and "`" in row:
            for message in re.findall(r"`([^`]+)`", row.split("|")[1]):
                for piece in re.split(r"\.\.\.|: ", message):
                    assert piece.strip() in plain, f"no error says {message!r}"
