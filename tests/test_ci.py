"""The files of continuous integration agree with what they are about."""

from __future__ import annotations

import re
import tomllib

import yaml
from helpers.paths import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from steer import compat
from steer.engine import compat as engine_compat


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["train"]]]
    bounds = {
        canonicalize_name(r.name): Version(s.version)
        for r in wanted
        for s in r.specifier
        if s.operator == ">="
    }
    lines = [line for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines() if line[0] != "#"]
    pins = {canonicalize_name(name): Version(version) for name, version in (x.split("==") for x in lines)}
    assert pins.keys() <= bounds.keys()
    assert bounds.keys() - pins.keys() == {"pebble"}  # whose 5.0.0 was withdrawn
    for name, pin in pins.items():
        bound = bounds[name].release
        assert pin.release[: len(bound)] == bound, name


def test_what_steer_was_checked_with_has_upper_bounds() -> None:
    """Names that libraries do not document are used of these: another release may be without them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    bounded = {
        canonicalize_name(r.name)
        for r in map(Requirement, texts)
        if any("<" in s.operator for s in r.specifier)
    }
    checked = {api.checked.split()[0] for api in (*compat.APIS, *engine_compat.APIS)}
    tools = {"sae-lens", "eai-sparsify", "dictionary-learning", "nnsight", "transformer-lens", "lm-eval"}
    assert {canonicalize_name(name).removesuffix("-cpu") for name in checked} | tools <= bounded


def test_the_workflow_runs_every_group_of_tools() -> None:
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(r"^interop:((?:.*\\\n)*.*)", makefile, re.MULTILINE)
    assert found
    groups = set(re.findall(r"interop-([\w-]+)", found[1]))
    assert "vllm" in groups
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert set(workflow["jobs"]["interop"]["strategy"]["matrix"]["tool"]) == groups | {"deepspeed"}


def test_the_workflow_makes_what_must_pass_before_a_change_lands() -> None:
    wanted = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    made = {found[1].rstrip("-") for step in steps if (found := re.match(r"make ([\w-]+)", step))}
    assert made == set(wanted)


def test_no_result_names_a_folder_of_a_machine() -> None:
    results = (ROOT / "evals" / "results").rglob("*")
    kept = [file for file in results if file.suffix in (".json", ".md", ".jsonl")]
    assert kept
    named = [file.name for file in kept if re.search(r"(?<![\w.])/(root|home|Users)/", file.read_text())]
    assert not named
