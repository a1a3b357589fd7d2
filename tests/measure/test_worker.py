"""A fork: what it inherits, what it says, and what it says when it can't begin."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from make import alive

from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.tree import TreeShape
from eagle_lab.engines.arm import Arm, parse
from eagle_lab.measure import worker
from eagle_lab.measure.pairs import Fork, Plan
from eagle_lab.measure.worker import WorkerDied, Workers, check_anew, in_processes, inherited
from eagle_lab.models.prompts import Prompt

PROMPTS = (Prompt("a", "own", "", (1, 124, 306, 281)), Prompt("b", "own", "", (1, 245, 323)))
BUILDER = """
import torch

def mine(parents):
    return torch.ones(len(parents) + 1, len(parents) + 1).bool().tril()
"""


def plan(candidate="doubling", **shape):
    sizes = {"top_k": 4, "depth": 3, "total_tokens": 16, **shape}
    arms = tuple(parse(name, Arm(shape=TreeShape(**sizes))) for name in ("rebuild", candidate))
    return Plan(arms, PROMPTS, 4, seed=1)


def worker_messages(pair, plan, fork):
    """The messages of one fork."""
    with Workers(pair, plan) as workers:
        yield from workers.messages(fork)


CHAIN = {"top_k": 1, "depth": 3, "total_tokens": 4}  # a chain, for which the triangle is the mask


@pytest.fixture
def registered(monkeypatch):
    def add(build):
        monkeypatch.setitem(MASK_BUILDERS, "mine", build)

    return add


def test_a_killed_process_gives_its_finished_pairs_and_then_says_so(tiny_pair):
    samples = []
    with pytest.raises(WorkerDied) as died:
        for message in worker_messages(tiny_pair, plan(), Fork(7, tuple(range(5000)))):
            if "process" in message:
                process = message["process"]
            elif "sample" in message:
                samples.append(message["sample"])
                if len(samples) == 3:
                    os.kill(process, signal.SIGKILL)
    assert len(samples) >= 3
    assert (died.value.fork, died.value.exit_code, died.value.begun) == (7, -9, True)


@pytest.fixture(params=[True, False], ids=["copies", "fresh"])
def workers(request, tiny_pair):
    with Workers(tiny_pair, plan()) as found:
        found.copies = request.param and found.copies
        yield found


def test_forks_are_processes_of_their_own_and_one_that_dies_takes_no_other_along(workers):
    processes = {}
    for number in range(3):
        messages = workers.messages(Fork(number, (0, 1, 2)))
        try:
            for message in messages:
                processes.setdefault(number, message.get("process"))
                if number == 1 and "process" in message:  # "begun" may follow before it is gone
                    os.kill(message["process"], signal.SIGKILL)
        except WorkerDied as died:
            assert (died.fork, died.exit_code) == (1, -9)
    assert len(set(processes.values())) == 3 and os.getpid() not in processes.values()
    samples = [m["sample"].iteration for m in workers.messages(Fork(3, (5, 6))) if "sample" in m]
    assert samples == [5, 6]


def test_a_fork_that_nobody_listens_to_any_more_ends(workers):
    messages = workers.messages(Fork(0, tuple(range(100_000))))
    process = next(messages)["process"]
    assert "begun" in next(messages)
    messages.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(process):
        time.sleep(0.02)
    assert not alive(process)


def test_copies_of_one_process_run_as_many_threads_as_this_one(tiny_pair):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        samples = []
        with Workers(tiny_pair, plan()) as workers:
            for number in range(2):
                samples += [m for m in workers.messages(Fork(number, (0,))) if "sample" in m]
        assert len(samples) == 2
    finally:
        torch.set_num_threads(threads)


def test_what_a_library_prints_is_not_taken_for_a_message(tiny_pair, tmp_path, monkeypatch):
    """Whatever is written to descriptors 1 and 2, by a library in C or by Python, before and during the pairs."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(1, b'MKL_VERBOSE at the start\\n')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("MKL_VERBOSE", "1")
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    samples = [m["sample"] for m in worker_messages(tiny_pair, plan(), Fork(0, (0, 1))) if "sample" in m]
    assert [s.iteration for s in samples] == [0, 1]


def test_a_notebooks_own_builder_reaches_a_fresh_process(tiny_pair, registered):
    namespace = {}
    exec(BUILDER, namespace)
    namespace["mine"].__module__ = "__main__"
    registered(namespace["mine"])
    messages = list(worker_messages(tiny_pair, plan("mine", **CHAIN), Fork(0, (0,))))
    (found,) = (m for m in messages if "sample" in m)
    assert "tokens" not in found

    def known(pair, number):
        return "mine" in MASK_BUILDERS

    assert in_processes(tiny_pair, plan("mine", **CHAIN).arms, 2, known) == [True, True]


def test_a_builder_beside_the_notebook_is_found_where_this_process_finds_it(
    tiny_pair, tmp_path, monkeypatch, registered
):
    (tmp_path / "my_builders.py").write_text(BUILDER)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    from my_builders import mine

    registered(mine)
    chosen = plan("mine", **CHAIN)
    check_anew(tiny_pair, chosen)
    assert any("sample" in m for m in worker_messages(tiny_pair, chosen, Fork(0, (0,))))
    # where this process finds it no more, neither does a fresh one: said within seconds, before any work
    monkeypatch.setattr(sys, "path", sys.path[:-1])
    began = time.monotonic()
    with pytest.raises(ValueError, match="mask builder 'mine': ModuleNotFoundError.*my_builders.*forks=1"):
        check_anew(tiny_pair, chosen)
    assert time.monotonic() - began < 60
    monkeypatch.delitem(sys.modules, "my_builders")


def test_a_builder_that_cannot_be_sent_is_one_sentence(tiny_pair, registered):
    import threading

    lock = threading.Lock()

    def mine(parents):
        with lock:
            return torch.ones(len(parents) + 1, len(parents) + 1).bool().tril()

    mine.__module__ = "__main__"
    registered(mine)
    with pytest.raises(ValueError, match="mask builder 'mine': it can't be pickled .*lock.*forks=1"):
        check_anew(tiny_pair, plan("mine"))


def test_a_process_that_cannot_load_the_pair_says_so_and_has_not_begun(tiny_pair, monkeypatch):
    monkeypatch.setitem(tiny_pair.origin, "draft", "/nowhere/at/all")
    with pytest.raises(WorkerDied, match="could not begin: .*exit code 1: .*nowhere") as died:
        list(worker_messages(tiny_pair, plan(), Fork(0, (0,))))
    assert not died.value.begun


def test_a_fresh_process_has_this_ones_environment_folder_path_and_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(tmp_path / "src")])
    monkeypatch.setenv("SOMETHING", "of mine")
    found = inherited()
    places = found["PYTHONPATH"].split(os.pathsep)
    assert places[0] == str(tmp_path) and str(tmp_path / "src") in places and found["SOMETHING"] == "of mine"
    assert len(places) == len(set(places))


def test_a_process_without_standard_streams_has_fresh_ones_all_the_same(tiny_pair):
    """Under a service manager descriptors 0 and 1 may be closed: the next pipe gets their numbers."""
    kept = [os.dup(0), os.dup(1)]
    os.close(0)
    os.close(1)
    try:
        messages = list(worker_messages(tiny_pair, plan(), Fork(0, (0,))))
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
    assert any("sample" in m for m in messages)


def test_a_working_folder_that_is_gone_is_one_sentence(tiny_pair, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match="the working folder of this process was removed"):
        check_anew(tiny_pair, plan())


def test_a_fresh_process_runs_as_many_threads_as_this_one(tiny_pair, registered):
    threads = torch.get_num_threads()
    namespace = {"wanted": threads + 1}
    told = "def mine(parents):\n    assert torch.get_num_threads() == wanted, torch.get_num_threads()\n"
    exec(BUILDER.replace("def mine(parents):\n", told), namespace)
    namespace["mine"].__module__ = "__main__"
    registered(namespace["mine"])
    torch.set_num_threads(threads + 1)
    try:
        assert any("sample" in m for m in worker_messages(tiny_pair, plan("mine", **CHAIN), Fork(0, (0,))))
    finally:
        torch.set_num_threads(threads)


def test_the_last_line_that_says_something():
    assert worker.last_line(b"one\n\nValueError: two\n\n") == "ValueError: two"
    assert worker.last_line(b"\n") == ""


def test_a_function_measures_in_fresh_processes(tiny_pair):
    """Each is a process of its own with the pair and the threads of this one; one that raises is named with its error."""

    def measure(pair, number, word):
        print("what a library says")
        return os.getpid(), number, word, pair.target_name, torch.get_num_threads()

    (one, *rest), (other, *more) = in_processes(tiny_pair, (), 2, measure, word="a")
    assert len({one, other, os.getpid()}) == 3
    same = ["a", tiny_pair.target_name, torch.get_num_threads()]
    assert (rest, more) == ([0, *same], [1, *same])
    assert in_processes(tiny_pair, (), 1, measure, word="a") == [(os.getpid(), 0, *same)]
    with pytest.raises(WorkerDied, match="fork 0 ended with exit code 1: TypeError"):
        in_processes(tiny_pair, (), 2, measure)
    with pytest.raises(ValueError, match="put together by hand.* with forks=1"):
        in_processes(replace(tiny_pair, origin={}), (), 2, measure)
