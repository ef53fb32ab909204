"""Ready-made configs are found in a checkout and inside an installed package, and nowhere else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from swarm.errors import ConfigError
from swarm.host.presets import preset_path

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["site-packages/swarm/presets", "checkout/peers"])
def installed(request, tmp_path):
    folder = tmp_path / request.param
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "demo.yaml").write_text("name: demo\n")
    return tmp_path / request.param.split("/")[0] / "swarm"


def test_it_is_found_whichever_way_swarm_was_installed(installed):
    assert preset_path("runs/demo.yaml", package=installed).read_text() == "name: demo\n"


def test_what_the_package_carries_comes_before_a_stranger_s_peers_folder_beside_it(installed):
    for folder in (installed / "presets" / "runs", installed.parent / "peers" / "runs"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "demo.yaml").write_text(str(folder))
    assert preset_path("runs/demo.yaml", package=installed).read_text() == str(installed / "presets" / "runs")


def test_an_unknown_one_is_an_error_that_lists_those_there_are(installed):
    with pytest.raises(ConfigError) as caught:
        preset_path("runs/dmeo.yaml", package=installed)
    assert "runs/demo.yaml" in str(caught.value)


def test_an_installation_without_any_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"runs/demo\.yaml") as caught:
        preset_path("runs/demo.yaml", package=tmp_path / "swarm")
    assert "carries none" in caught.value.why


def test_a_path_does_not_lead_out_of_the_folder(installed):
    (installed.parent / "secret.yaml").write_text("x")
    for path in ("../secret.yaml", "../../secret.yaml", "runs/../../secret.yaml", "runs"):
        with pytest.raises(ConfigError):
            preset_path(path, package=installed)


def test_the_checkout_has_the_demo_run():
    assert preset_path("runs/demo.yaml") == ROOT / "peers" / "runs" / "demo.yaml"


def test_the_wheel_has_the_demo_run_and_finds_it_from_anywhere(tmp_path):
    pytest.importorskip("setuptools")
    source, unpacked = tmp_path / "source", tmp_path / "site-packages"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("swarm", "peers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "bdist_wheel"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    look = "from swarm.host.presets import preset_path; print(preset_path('runs/demo.yaml'))"
    environ = {**os.environ, "PYTHONPATH": str(unpacked)}
    found = subprocess.run(
        [sys.executable, "-c", look], cwd=tmp_path, env=environ, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(unpacked / "swarm" / "presets" / "runs" / "demo.yaml")
