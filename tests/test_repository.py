"""Files of the repository that repeat a fact agree with each other: versions, addresses, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
RELEASES = re.findall(r"^## \[?(\d[\d.]*)\]? - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
ADDRESS = "https://github.com/dali-saliencymix/dali-saliencymix"


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def settings():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def project(settings):
    return settings["project"]


def test_the_workflow_tests_the_pythons_that_the_package_supports(project):
    version = r"Programming Language :: Python :: (3\.\d+)"
    supported = [found[1] for each in project["classifiers"] if (found := re.fullmatch(version, each))]
    assert f">={supported[0]}" == project["requires-python"]
    for job in ("check", "arrays"):
        matrix = load(".github/workflows/ci.yml")["jobs"][job]["strategy"]["matrix"]
        assert matrix["python"] + [each["python"] for each in matrix.get("include", [])] == supported


def test_the_citation_describes_the_latest_release_of_the_package(project):
    citation = load("CITATION.cff")
    assert RELEASES[0] == (citation["version"], citation["date-released"])
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    assert citation["repository-code"] == ADDRESS
    assert ADDRESS in project["urls"].values()


def test_a_copy_without_tags_has_the_version_of_the_latest_release(settings):
    assert settings["tool"]["hatch"]["version"]["fallback-version"] == RELEASES[0][0]


def test_releases_are_in_order_and_have_a_link():
    dates = [date for _, date in RELEASES]
    assert dates == sorted(dates, reverse=True)
    links = dict(re.findall(r"^\[(.+?)\]: (.*)$", CHANGELOG, re.MULTILINE))
    named = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.MULTILINE)
    assert list(links) == named
    assert links["Unreleased"] == f"{ADDRESS}/compare/v{RELEASES[0][0]}...HEAD"
    assert all(links[version] == f"{ADDRESS}/releases/tag/v{version}" for version in named[1:])


def test_the_hooks_run_the_commands_of_make_lint():
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    assert hooks == [line.strip().replace("$(python)", ".venv-cuda12/bin/python") for line in recipe.splitlines()]
