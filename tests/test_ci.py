"""The workflow of docs/ci.md: its steps up to the posting run as they are written, in a checkout of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
(WORKFLOW,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/ci.md").read_text(), re.M | re.S)
STEPS = yaml.safe_load(WORKFLOW)["jobs"]["compare"]["steps"]
RUNS = {step["name"]: step["run"] for step in STEPS if "run" in step}


def test_the_page_is_posted_last_and_even_where_the_gate_fails():
    assert list(RUNS) == ["set up", "compare", "page", "post"]
    assert "failure()" in STEPS[-1]["if"] and "speed/page.md" in RUNS["post"]


@pytest.mark.slow
def test_its_steps_run_on_a_checkout(tmp_path):
    git = ["git", "-c", "advice.detachedHead=false"]
    if subprocess.run([*git, "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, check=False).returncode:
        pytest.skip("this copy is no git checkout, so there is no base to hold it against")
    here = tmp_path / "checkout"
    subprocess.run([*git, "clone", "-q", str(ROOT), str(here)], check=True)
    (here / ".venv").symlink_to(sys.prefix)  # in place of "set up"
    commit = subprocess.run(
        [*git, "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "BASE": commit,
        "OPTIONS": "--iterations 1 --max-new-tokens 6 --total-tokens 7 --depth 3 --top-k 3",
        "PYTHONPATH": str(here),
    }

    def step(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-eo", "pipefail", "-c", RUNS[name]],
            cwd=here, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = step("compare")
    if "0 pairs" in done.stdout:  # another program disturbed the only pair
        shutil.rmtree(here / "speed")
        done = step("compare")
    assert done.returncode == 0, done.stdout + done.stderr
    done = step("page")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (here / "speed/page.md").read_text()
    assert "INCONCLUSIVE" in page and commit[:9] in page
    assert not subprocess.run(
        [*git, "-C", here, "worktree", "list", "--porcelain"], capture_output=True, text=True, check=True
    ).stdout.count("eagle_lab-"), "a worktree was left behind"
