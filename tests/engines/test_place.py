"""What an arm leaves on a machine goes: after an exception, after a signal, and after SIGKILL with the next run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from make import worktrees

from eagle_lab import ROOT
from eagle_lab.engines.place import MARK, place

# an arm as `opened` makes it: a worktree, and a worker that hangs, with a child in a session of its own
WORKER = """
import json, subprocess, sys, time
for line in sys.stdin:
    ask = json.loads(line)["ask"]
    if ask == "decode":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        time.sleep(600)
    print(json.dumps({"answer": ask, "protocol": 1, "engine": "hangs", "version": "1"}), flush=True)
"""
RUN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what nohup starts without this
from eagle_lab.engines.place import MARK, in_order, place
from eagle_lab.engines.protocol import Worker
from eagle_lab.engines.revision import code_of
with in_order(), place() as home:
    code_of("HEAD", home)
    with Worker("hangs", [sys.executable, "-S", sys.argv[1]], {**os.environ, MARK: str(home)}) as worker:
        worker.hello({})
        print(home, flush=True)
        worker.decode([1], 3, None)
"""


def marked(folder: str) -> list[psutil.Process]:
    """The processes that bear a place's mark, but for the run itself."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.fixture
def run(tmp_path):
    """A run in the middle of a decode, and its place."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", RUN, str(tmp_path / "worker.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    folder = process.stdout.readline().strip()
    deadline = time.monotonic() + 30
    while len(marked(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(marked(folder)) == 2 and folder in str(worktrees())
    yield process, folder
    process.kill()
    process.wait()


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this checkout has no git history")


@needs_git
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_ended_leaves_nothing(run, number):
    process, folder = run
    process.send_signal(number)
    assert process.wait(30) == -number
    assert not Path(folder).exists() and folder not in str(worktrees()) and not marked(folder)


@needs_git
def test_what_a_killed_run_left_goes_with_the_next(run):
    process, folder = run
    with place() as other:
        assert Path(folder).exists() and marked(folder)  # it is at work
        process.kill()
        process.wait()
        assert folder in str(worktrees())
        with place():
            assert not Path(folder).exists() and folder not in str(worktrees()) and not marked(folder)
        assert other.exists()  # and so is this one
    assert not other.exists()
