"""Forks on several GPUs or machines: each is a task of Ray, in a fresh process on a node that has room for it.

A fork's pairs are all taken by one process on one device. What a task sends is what a worker's pipe brings
(`worker.work_messages`), after the place where it runs. Where its node or its process dies, what it had finished stays and
the rest is another fork, with a number of its own, elsewhere. Needs the extra `cluster`; tried with Ray 2.60.
"""

from __future__ import annotations

import importlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any, Literal

import torch

from eagle_lab.measure.environment import Environment, fingerprint, moved
from eagle_lab.measure.pairs import Fork, Message, Plan, remaining
from eagle_lab.measure.records import ForkLost, Place
from eagle_lab.measure.worker import Work, work_messages
from eagle_lab.models.pair import Pair
from eagle_lab.runtime.checks import flat

PLACE_S = 120.0  # how long a task waits for room on a node while none of its run's own is at work
REACH_S = 10.0  # how long a head may take to answer
TRIES = 3  # processes that take one fork, where nodes or processes die under it
STORE_BYTES = 80 << 20  # a cluster of this machine's own needs next to none, as messages are small
# "0": Ray takes 127.0.0.1 for its address and listens there alone
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ENDED = object()


class ClusterFailed(RuntimeError):
    """A cluster that can't be reached, has no room, or lacks what a task needs; what was finished is kept."""


def needs_of(pair: Pair) -> dict[str, float]:
    """What one fork takes of a node, in Ray's words: the GPUs that hold the target, or as many cores as torch has threads.

    Raises ValueError for a device that Ray does not count.
    """
    if pair.device.type == "cuda":
        return {"num_gpus": len({p.device for p in pair.target.parameters()}), "num_cpus": 1}
    if pair.device.type != "cpu":
        raise ValueError(f"a cluster counts cores and CUDA GPUs, no {pair.device.type}; leave cluster out.")
    return {"num_cpus": torch.get_num_threads()}


def connect(address: str) -> tuple[Any, bool]:
    """Ray, connected, and whether this call did it: to "local" (a cluster of this machine for this process alone, on its
    loopback), "auto" (the one that Ray finds here) or HOST:PORT.

    Raises ClusterFailed, one sentence, within seconds.
    """
    host, _, port = address.rpartition(":")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if address == "local" or host == "localhost" or host.startswith("127."):
        os.environ.setdefault(ON_LOOPBACK, "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ClusterFailed(
            "a cluster needs Ray, which is not here; pip install 'eagle-lab[cluster]'."
        ) from None
    if ray.is_initialized():
        return ray, False
    if address not in ("auto", "local"):
        try:
            socket.create_connection((host, int(port)), timeout=REACH_S).close()
        except (OSError, ValueError) as error:
            raise ClusterFailed(
                f"no head of a Ray cluster answers at {address} ({error}); name HOST:PORT, auto or local."
            ) from None
    own = {"include_dashboard": False, "object_store_memory": STORE_BYTES} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # Ray raises bare ones where a node is slow to start
        raise ClusterFailed(f"the Ray cluster at {address} can't be used: {_line(error)}") from None
    here = ray.util.get_node_ip_address()
    if address == "local" and os.environ[ON_LOOPBACK] == "0" and not here.startswith("127."):
        ray.shutdown()
        raise ClusterFailed(
            f"Ray was imported before and would listen on {here}; start Python with {ON_LOOPBACK}=0."
        )
    return ray, True


class Tasks:
    """Generators at work on a cluster, each in a fresh process: `start` them, then listen to `answers`; a context manager.

    needs: what each takes of a node, as `needs_of` gives it. Raises ClusterFailed as `connect` does.
    """

    def __init__(self, address: str, needs: dict[str, float]) -> None:
        self.needs = needs
        self.ray, self.own = connect(address)
        self.running: dict[Any, Any] = {}

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.running:
            self.ray.cancel(stream, force=True)
        self.running.clear()
        if self.own:
            self.ray.shutdown()

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as Ray describes them."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    @property
    def room(self) -> int:
        """How many tasks the nodes hold at once, one at least."""
        names = {"num_gpus": "GPU", "num_cpus": "CPU"}
        have, wanted = [node["Resources"] for node in self.nodes], self.needs.items()
        return max(1, sum(min(int(x.get(names[name], 0) // n) for name, n in wanted) for x in have))

    def start(self, key: Any, function: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        """Begin a generator function as soon as a node has room."""
        # a process takes one task, and no task is begun anew behind our back
        remote = self.ray.remote(num_returns="streaming", max_retries=0, max_calls=1, **self.needs)(function)
        self.running[remote.remote(*arguments)] = key

    def answers(self) -> Iterator[tuple[Any, Any]]:
        """(key, what its generator yielded), as it comes, then (key, ENDED) or (key, the RayError that ended it).

        Raises ClusterFailed where for `PLACE_S` nothing is at work and no node has room.
        """
        placed: set[Any] = set()
        since = time.monotonic()
        while self.running:
            for stream in self.ray.wait(list(self.running), num_returns=1, timeout=1)[0]:
                key = self.running[stream]
                try:
                    found = self.ray.get(next(stream))
                    placed.add(stream)
                except (StopIteration, self.ray.exceptions.RayError) as error:
                    del self.running[stream]
                    placed.discard(stream)
                    found = ENDED if isinstance(error, StopIteration) else error
                since = time.monotonic()
                yield key, found
            if not placed and self.running and time.monotonic() - since > PLACE_S:
                raise ClusterFailed(self._no_room())

    def _no_room(self) -> str:
        wanted = " and ".join(f"{n:g} {name.removeprefix('num_')}" for name, n in self.needs.items())
        have = "; ".join(
            f"{node['NodeManagerHostname']} {node['Resources'].get('CPU', 0):g} cpus and "
            f"{node['Resources'].get('GPU', 0):g} gpus"
            for node in self.nodes
        )
        return f"no node had room within {PLACE_S:g} s for a task that needs {wanted}; the nodes have {have or 'nothing'}."


def fork_task(work: Work, fork: Fork, driver: Environment) -> Iterator[Message]:
    """One fork on a node: {"place": Place}, then the messages of `work_messages`.

    Raises ClusterFailed where the node has other versions or another commit than the driver.
    """
    import ray

    torch.set_num_threads(work.threads)
    here = fingerprint(work.origin["device"])
    machine, node = socket.gethostname(), ray.get_runtime_context().get_node_id()[:8]
    yield {"place": Place(fork=fork.number, machine=machine, node=node, environment=here)}
    unlike = moved(driver, here.model_copy(update={"cpu": driver.cpu, "gpu": driver.gpu}))
    if driver.commit and here.commit and driver.commit != here.commit:
        unlike.append(f"eagle_lab at {driver.commit[:9]}, and here it is at {here.commit[:9]}")
    if unlike:
        raise ClusterFailed(f"the run was begun with {'; '.join(unlike)}.")
    yield from work_messages(work, fork)


class Cluster:
    """Forks of one plan on a cluster; a context manager. Raises ClusterFailed and ValueError as `Tasks` and `needs_of` do."""

    def __init__(self, pair: Pair, plan: Plan, address: str) -> None:
        work = Work.of(pair, plan)
        if pair.device.type == "cuda":  # a task sees only the GPUs that it was given
            work = replace(work, origin=work.origin | {"device": "cuda"})
        self.work, self.driver = work, fingerprint(str(pair.device))
        self.tasks = Tasks(address, needs_of(pair))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.tasks.__exit__(*error)

    def shared(self, forks: int, seconds: float) -> float:
        """What each of so many forks has of the seconds, where as many as there is room for are at work at once."""
        return seconds / math.ceil(forks / self.tasks.room)

    def messages(self, forks: Iterable[Fork], begun: Iterable[int] = ()) -> Iterator[Message]:
        """The messages of all forks as they come, with {"place": Place} of each and {"lost": ForkLost}.

        begun: numbers of forks whose process is gone: what is left of them gets another number. Raises ClusterFailed where a
        node lacks what a fork needs, and as `Tasks.answers` does.
        """
        forks, gone = list(forks), set(begun)
        numbers = count(1 + max([fork.number for fork in forks] + list(gone), default=0))
        at_work: dict[int, tuple[Fork, int]] = {}
        places: dict[int, Place] = {}
        taken: dict[int, list[Any]] = {}

        def start(fork: Fork, tries: int) -> None:
            at_work[fork.number], taken[fork.number] = (fork, tries), []
            self.tasks.start(fork.number, fork_task, self.work, fork, self.driver)

        for fork in forks:
            start(replace(fork, number=next(numbers)) if fork.number in gone else fork, 1)
        for number, found in self.tasks.answers():
            if found is ENDED:
                del at_work[number]
            elif isinstance(found, Exception):
                fork, tries = at_work.pop(number)
                place = places.get(number)
                raised = getattr(found, "cause", None)
                if raised is not None and not taken[number]:
                    where = place.machine if place else "a node"
                    raise ClusterFailed(f"{where} can't take a fork: {_line(raised)}")
                rest = remaining(
                    fork, (m["instance"] if "instance" in m else m["sample"] for m in taken[number])
                )
                again = raised is None and tries < TRIES
                anew = replace(rest, number=next(numbers)) if again else None
                yield {"lost": _lost(fork, place, found, raised, anew)}
                if anew:
                    start(anew, tries + 1)
            else:
                if "place" in found:
                    places[number] = found["place"]
                elif "instance" in found or "sample" in found:
                    taken[number].append(found)
                yield found


def _lost(
    fork: Fork, place: Place | None, error: Exception, raised: BaseException | None, anew: Fork | None
) -> ForkLost:
    why: Literal["node died", "process died", "raised"] = "raised" if raised else "process died"
    if not raised and "Node" in type(error).__name__:
        why = "node died"
    return ForkLost(
        fork=fork.number, machine=place.machine if place else None, node=place.node if place else None, why=why,
        said=_line(raised) if raised else None, anew=anew.number if anew else None,
    )  # fmt: skip


def _line(error: BaseException) -> str:
    """An error in one line: its own words where it is ours, else with its name."""
    ours = isinstance(error, ValueError | OSError | ClusterFailed)
    words = flat(error)
    return words if ours and words else f"{type(error).__name__}: {words}"
