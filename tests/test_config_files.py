"""Do the files that configure the project agree with each other?"""

import configparser
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, NBDEV = PYPROJECT["project"], PYPROJECT["tool"]["nbdev"]
_reader = configparser.ConfigParser(delimiters=["="], interpolation=None)
_reader.read(ROOT / "settings.ini")
SETTINGS = _reader["DEFAULT"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def installed_directly() -> list[Requirement]:
    wanted = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    return [Requirement(r) for r in wanted + PYPROJECT["build-system"]["requires"]]


@pytest.mark.parametrize("name", sorted(set(NBDEV) & set(SETTINGS)))
def test_settings_ini_says_what_tool_nbdev_says(name):
    value = NBDEV[name]
    said = " ".join(value) if isinstance(value, list) else str(value)
    assert SETTINGS[name] == said


def test_every_nbdev_setting_is_in_settings_ini():
    assert set(NBDEV) <= set(SETTINGS)


def test_settings_ini_describes_the_same_project():
    assert SETTINGS["lib_name"] == PROJECT["name"] == SETTINGS["lib_path"]
    assert SETTINGS["description"] == PROJECT["description"]
    assert SETTINGS["author"] == PROJECT["authors"][0]["name"]
    assert SETTINGS["keywords"].split() == [k.replace(" ", "-") for k in PROJECT["keywords"]]
    assert f">={SETTINGS['min_python']}" == PROJECT["requires-python"]
    assert SETTINGS["requirements"].split() == PROJECT["dependencies"]
    assert SETTINGS["dev_requirements"].split() == PROJECT["optional-dependencies"]["dev"]
    assert SETTINGS["console_scripts"] == "".join(f"{k}={v}" for k, v in PROJECT["scripts"].items())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "nemotron_nb" / "__init__.py").read_text())[1]
    assert SETTINGS["version"] == version


def test_tags_survive_nbdev_clean():
    """Without this papermill finds no parameters cell, injects at the top, and the defaults win in silence."""
    assert "tags" in NBDEV["allowed_cell_metadata_keys"]


def test_one_tested_version_of_everything_that_is_installed():
    known = pins()
    for requirement in installed_directly():
        name = requirement.name.lower().replace("_", "-")
        assert name in known, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(known[name]), f"{name}=={known[name]} is not {requirement.specifier}"


def test_the_pins_that_must_not_move():
    assert {k: pins()[k] for k in ("torch", "transformers", "triton", "nbdev")} == {
        "torch": "2.13.0",
        "transformers": "5.12.1",
        "triton": "3.7.1",
        "nbdev": "3.3.26",
    }
    assert "torch==2.13.0" in (ROOT / ".ci" / "setup").read_text()


def test_constraints_name_no_place_of_this_or_any_machine():
    text = (ROOT / "constraints.txt").read_text()
    assert "file:" not in text and " @ " not in text and "-e " not in text and "+cpu" not in text


def test_uv_takes_the_same_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert PYPROJECT["tool"]["uv"]["constraint-dependencies"] == [line for line in lines if line and not line.startswith("#")]


def test_uv_takes_the_build_of_pytorch_for_cpus_on_linux():
    """On PyPI there is the one for CUDA, with several GB of libraries; macOS and Windows find theirs there."""
    uv = PYPROJECT["tool"]["uv"]
    (source,), (index,) = uv["sources"]["torch"], uv["index"]
    assert source == {"index": index["name"], "marker": "sys_platform == 'linux'"}
    assert index["url"].endswith("/whl/cpu") and index["explicit"], "every other package comes from where it always does"
    assert "install --no-sources" in (ROOT / ".ci" / "setup").read_text(), "make takes the build that pip finds"


def test_no_lock_file_names_one_machine():
    assert not (ROOT / "uv.lock").exists()
