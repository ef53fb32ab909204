"""The rules of the house (swarm/README.md), kept by reading every import: who may import whom, how long files get."""

import ast
import configparser
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "swarm").rglob("*.py"))
OURS = FILES + sorted((ROOT / "scripts").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))
ENTRY_POINTS = {"peer", "restart", "cli", "observer", "program", "asking", "chat", "evaluate", "plan", "plan_report"}
LEAVES = {"config", "config_data", "config_reader", "errors", "events", "units"}
# a row may import from the rows below it, never from its own
LAYERS = [
    ENTRY_POINTS,
    {"monitor"},
    {"train"},
    {"pipeline", "averaging"},
    {"model", "data", "network", "host"},
    LEAVES,
]
HEIGHT = {part: len(LAYERS) - row for row, parts in enumerate(LAYERS) for part in parts}
ONLY_IN = {
    "hivemind": {"network"},
    "transformers": {"model", "data"} | ENTRY_POINTS,
    "datasets": {"data"} | ENTRY_POINTS,
    "rich": {"monitor"},
    "configargparse": {"cli"},
}


def name_of(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """swarm/network/link.py -> network, swarm/config.py -> config, swarm/__init__.py -> ''."""
    inside = path.relative_to(ROOT / "swarm").parts
    return inside[0] if len(inside) > 1 else path.stem.removeprefix("__init__")


def imports_of(path):
    """Every absolute module that is imported anywhere in the file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(params=FILES, ids=name_of)
def path(request):
    return request.param


def test_imports_point_down_only_and_siblings_never_import_each_other(path):
    part = part_of(path)
    for module in imports_of(path):
        if module.split(".")[0] == "swarm":
            target = module.split(".")[1]
            assert part == target or part == "" or target in HEIGHT, f"{module}: put {target} into LAYERS"
            leaf_to_leaf = part in LEAVES and target in LEAVES  # those may: config raises errors
            entry = part in ENTRY_POINTS and target in ENTRY_POINTS  # peer reads cli's arguments
            allowed = part == target or leaf_to_leaf or entry or HEIGHT[part] > HEIGHT[target]
            assert allowed, f"{name_of(path)} may not import {module}"


def test_the_package_imports_nothing_from_beside_it(path):
    outside = {module.split(".")[0] for module in imports_of(path)} & {"scripts", "peers", "tests"}
    assert not outside


def test_heavy_libraries_stay_where_they_belong(path):
    part = part_of(path)
    for module in imports_of(path):
        allowed = ONLY_IN.get(module.split(".")[0])
        assert allowed is None or part in allowed, f"{name_of(path)} may not import {module}"


@pytest.mark.parametrize("part", [*sorted(LEAVES), "cli"])
def test_leaves_use_the_standard_library_and_yaml_only(part):
    light = sys.stdlib_module_names | {"yaml", "swarm"} | ({"configargparse"} if part == "cli" else set())
    modules = set(imports_of(ROOT / "swarm" / f"{part}.py"))
    assert {module for module in modules if module.split(".")[0] not in light} == set()
    assert {module.split(".")[1] for module in modules if module.startswith("swarm.")} <= LEAVES


def test_every_part_has_its_layer():
    parts = {part_of(path) for path in FILES} - {""}
    assert parts <= HEIGHT.keys(), "put the new part into LAYERS, and say in swarm/README.md what it is for"


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_no_file_is_longer_than_anybody_wants_to_read(path):
    assert len(path.read_text().splitlines()) <= 500


def test_code_is_ascii(path):
    """So that no letter looks like another. Tests may need others, to see what becomes of them."""
    assert path.read_text(encoding="utf-8").isascii()


def test_every_file_of_the_package_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert path.name == "__init__.py" or ast.get_docstring(tree), f"{name_of(path)} opens without a docstring"


def test_the_wheel_carries_every_folder_of_the_package():
    """setup.cfg lists them by hand, because `find:` cannot add peers/ under another name."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = set(settings["options"]["packages"].split())
    code = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    presets = {path.parent for path in (ROOT / "peers").rglob("*.yaml")} | {ROOT / "peers"}
    carried = {".".join(["swarm", "presets", *folder.relative_to(ROOT / "peers").parts]) for folder in presets}
    assert code | carried <= listed
    for package in carried:
        assert settings["options.package_data"][package] == "*.yaml"
