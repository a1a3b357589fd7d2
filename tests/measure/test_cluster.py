"""Forks by a real Ray: two nodes on this machine's loopback, one killed in the middle; and what is said where it can't be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from make import GOLDEN

from eagle_lab.measure import cluster
from eagle_lab.measure.cluster import ENDED, Cluster, ClusterFailed
from eagle_lab.measure.pairs import Fork, remaining
from eagle_lab.measure.records import ForkLost, Place, Sample, read
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.record import ComparisonRecord, Resumed

os.environ[cluster.ON_LOOPBACK] = "0"  # read when Ray is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
STORE = 80 << 20
PROMPTS = [[1, 124, 306, 281], [1, 245, 323]]
SMALL = {
    "top_k": 4, "depth": 3, "total_tokens": 16, "max_new_tokens": 8, "progress": False, "prompts": PROMPTS,
}  # fmt: skip
DRIVER = """
import json, sys
import torch
torch.set_num_threads(1)
import eagle_lab
target, draft, place, address, options = sys.argv[1:]
pair = eagle_lab.load(target, draft, device="cpu", dtype="float32")
eagle_lab.compare(pair, candidate="doubling", results_dir=place, cluster=address, **json.loads(options))
"""


def needs_ray():
    return pytest.importorskip("ray", reason="Ray is not here; pip install 'eagle-lab[cluster]'")


def twice(start):
    """What `start` gives; Ray allows a node 30 seconds to start, which a busy machine may need more than once."""
    try:
        return start()
    except Exception:
        return start()


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two nodes with a core each, on this machine's loopback."""
    ray = needs_ray()
    from ray.cluster_utils import Cluster as Nodes

    usual = {"num_cpus": 1, "object_store_memory": STORE, "node_ip_address": "127.0.0.1"}
    found = twice(lambda: Nodes(initialize_head=True, head_node_args=usual | {"include_dashboard": False}))
    found.add = lambda: twice(lambda: found.add_node(**usual))
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def second(nodes):
    """The second node, there for one test."""
    node = nodes.add()
    yield node
    if node in nodes.worker_nodes:
        nodes.remove_node(node, allow_graceful=False)


def whole(record, count):
    """Whether each iteration was taken once."""
    assert sorted(i.iteration for i in record.instances) == list(range(count))


@pytest.mark.slow
def test_a_node_killed_in_the_middle_of_a_fork_loses_nothing_that_was_finished(
    tiny_pair, nodes, second, tmp_path
):
    killed = []

    def kill(sofar):
        for place in sofar.record.places:
            begun = any(i.fork == place.fork for i in sofar.record.instances)
            if not killed and begun and second.node_id.startswith(place.node):
                killed.append(place)
                nodes.remove_node(second, allow_graceful=False)

    found = compare(
        tiny_pair, candidate="doubling", iterations=40, forks=2, cluster=nodes.address, results_dir=tmp_path,
        on_sample=kill, **SMALL,
    )  # fmt: skip
    record = read(found.path, ComparisonRecord)
    assert record == found.record
    whole(record, 40)
    (lost,) = record.events
    assert isinstance(lost, ForkLost) and (lost.fork, lost.anew) == (killed[0].fork, 2)
    assert lost.why == "node died" and lost.node == killed[0].node and lost.machine == killed[0].machine
    places = {place.fork: place.node for place in record.places}
    assert set(places) == {0, 1, 2} and places[2] != places[lost.fork]
    kept, rest = ({i.iteration for i in record.instances if i.fork == n} for n in (lost.fork, 2))
    assert kept and rest and len(kept) + len(rest) == 20
    assert found.verdict.forks == 3


@pytest.mark.slow
def test_a_killed_driver_is_resumed_by_processes_with_numbers_of_their_own(tiny_pair, nodes, tmp_path):
    options = {"iterations": 40, "forks": 2, **SMALL}
    names = [str(x) for x in (GOLDEN / "target", GOLDEN / "draft_official", tmp_path, nodes.address)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *names, json.dumps(options)])
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and driver.poll() is None:
        lines = [path.read_text().count('"instances"') for path in tmp_path.glob("*.jsonl")]
        if lines and lines[0] >= 4:
            break
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, "it ended by itself, before it was killed"
    (path,) = tmp_path.glob("*.json")
    before = read(path, ComparisonRecord)
    assert 4 <= len(before.instances) < 40 and not before.finished
    found = compare(tiny_pair, candidate="doubling", cluster=nodes.address, resume=path, **options)
    whole(found.record, 40)
    assert found.record.instances[: len(before.instances)] == before.instances
    begun = {place.fork for place in before.places}
    later = {i.fork for i in found.record.instances[len(before.instances) :]}
    assert begun and not begun & later
    assert [type(event) for event in found.record.events] == [Resumed]


@pytest.mark.slow
def test_what_a_node_lacks_and_what_no_node_has_is_one_sentence(tiny_pair, nodes, tmp_path, monkeypatch):
    usual = {"candidate": "doubling", "iterations": 2, "forks": 2, "cluster": nodes.address, **SMALL}
    monkeypatch.setattr(cluster, "PLACE_S", 3.0)
    monkeypatch.setattr(cluster, "needs_of", lambda pair: {"num_cpus": 64})
    began = time.monotonic()
    with pytest.raises(ClusterFailed, match=r"no node had room within 3 s .* 64 cpus; .* 1 cpus and 0 gpus"):
        compare(tiny_pair, results_dir=tmp_path, **usual)
    assert time.monotonic() - began < 60
    monkeypatch.undo()
    monkeypatch.setitem(tiny_pair.origin, "draft", "/nowhere/at/all")
    with pytest.raises(ClusterFailed, match="can't take a fork: .*nowhere"):
        compare(tiny_pair, results_dir=tmp_path, **usual)


def listening(process):
    """Addresses on which a process and what it started listen."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            found |= {c.laddr.ip for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_cluster_of_this_machine_listens_on_its_loopback_alone(tmp_path):
    needs_ray()
    names = [str(x) for x in (GOLDEN / "target", GOLDEN / "draft_official", tmp_path, "local")]
    options = {"iterations": 4, "forks": 2, **SMALL}
    seen = set()

    def alone():
        run = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *names, json.dumps(options)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        while run.poll() is None:
            seen.update(listening(psutil.Process(run.pid)))
            time.sleep(1)
        said = run.stdout.read()
        assert run.returncode == 0, said

    twice(alone)
    assert seen and all(address.rpartition(":")[2].startswith("127.") for address in seen), seen
    (path,) = tmp_path.glob("*.json")
    record = read(path, ComparisonRecord)
    assert record.settings.cluster and {p.fork for p in record.places} == {0, 1}
    assert "cluster=" in record.command and "auto" in record.command


def test_a_head_that_does_not_answer_is_one_sentence():
    needs_ray()
    began = time.monotonic()
    with pytest.raises(ClusterFailed, match="no head of a Ray cluster answers at 127.0.0.1:1 .*HOST:PORT"):
        cluster.connect("127.0.0.1:1")
    assert time.monotonic() - began < 60


def test_a_missing_ray_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterFailed, match=r"pip install 'eagle-lab\[cluster\]'"):
        cluster.connect("local")


def sample(iteration, **changes):
    values = {
        "fork": 0, "iteration": iteration, "prompt": "p", "control": False, "order": "baseline first", "baseline_s": 1.0,
        "candidate_s": 1.0, "new_tokens": 1, "cycles": 1, "foreign_load": 0.0,
    }  # fmt: skip
    return Sample(**values | changes)


def test_what_remains_of_a_fork_is_what_no_process_took():
    fork = Fork(4, (3, 4, 5), wholes=2)
    taken = [sample(3, fork=9), sample(1), sample(4, control=True)]
    assert remaining(fork, taken) == Fork(4, (4, 5), wholes=1)


class Script:
    """Answers of tasks that are told: for each start, the next list of them."""

    def __init__(self, *scripts):
        self.scripts, self.started = list(scripts), []

    def start(self, key, function, work, fork, driver):
        self.started.append(fork)

    def answers(self):
        at = 0
        while at < len(self.started):
            for answer in self.scripts[at]:
                yield self.started[at].number, answer
            at += 1


class Raised(Exception):
    cause = ValueError("out of memory")


class NodeDiedError(Exception):
    pass


def told(fork, *scripts, begun=()):
    source = Cluster.__new__(Cluster)
    source.work, source.driver, source.tasks = None, None, Script(*scripts)
    return list(source.messages([fork], begun)), source.tasks.started


def test_a_fork_is_taken_anew_so_often_and_one_that_raised_is_not(monkeypatch):
    died, place = NodeDiedError("gone"), Place.model_construct(fork=0, machine="m", node="n")
    first = [{"place": place}, {"sample": sample(0)}, died]
    messages, started = told(Fork(0, (0, 1, 2)), first, [{"sample": sample(1)}, died], [died])
    lost = [m["lost"] for m in messages if "lost" in m]
    assert [(one.fork, one.anew, one.why) for one in lost] == [
        (0, 1, "node died"), (1, 2, "node died"), (2, None, "node died"),
    ]  # fmt: skip
    assert [(f.number, f.iterations) for f in started] == [(0, (0, 1, 2)), (1, (1, 2)), (2, (2,))]
    assert (lost[0].machine, lost[1].machine) == ("m", None)
    messages, started = told(Fork(0, (0, 1)), [{"sample": sample(0)}, Raised()])
    assert (messages[-1]["lost"].said, messages[-1]["lost"].anew, len(started)) == ("out of memory", None, 1)
    with pytest.raises(ClusterFailed, match="m can't take a fork: out of memory"):
        told(Fork(0, (0,)), [{"place": place}, Raised()])
    _, started = told(Fork(0, (0,)), [ENDED], begun=[0, 4])
    assert started[0].number == 5


def test_forks_at_work_at_once_share_the_time():
    node = {"Alive": True, "Resources": {"GPU": 2.0, "CPU": 8.0}}
    nodes = [node, node | {"Resources": {"CPU": 8.0}}, node | {"Alive": False}]
    source = Cluster.__new__(Cluster)
    source.tasks = cluster.Tasks.__new__(cluster.Tasks)
    source.tasks.ray = SimpleNamespace(nodes=lambda: nodes)
    source.tasks.needs = {"num_gpus": 1, "num_cpus": 1}
    assert source.tasks.room == 2 and source.shared(7, 100.0) == 25.0
    source.tasks.needs = {"num_gpus": 4, "num_cpus": 1}
    assert source.tasks.room == 1
