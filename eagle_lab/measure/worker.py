"""A fork: a fresh process that takes samples. JMH's word, and JMH's reason.

Layout, allocator and clocks give each process a bias that interleaving can't cancel, so a verdict rests on several.
`Workers` is the side that starts them. Run as a module, this file is the process itself: it reads its work from the
standard input and writes one JSON line a message to a descriptor of its own. Its standard output and error belong to
whatever library writes there, and go to a log. `in_processes` starts others, each of which measures by a function.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import cloudpickle
import torch

from eagle_lab import ROOT
from eagle_lab.decode.masks import MASK_BUILDERS, MaskBuilder, own
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.here import pair_of
from eagle_lab.measure.pairs import Fork, Message, Plan, fork_messages, renew, warm_up
from eagle_lab.measure.records import InstanceSample, PartCalls, Sample
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.targets import format_bytes, free_bytes

T = TypeVar("T")
READ = {
    "instance": InstanceSample.model_validate,
    "sample": Sample.model_validate,
    "part": PartCalls.model_validate,
}


class WorkerDied(RuntimeError):
    """A fresh process ended before its work was done; `begun`: whether it had loaded the pair by then."""

    def __init__(self, fork: int, exit_code: int, last_words: str, begun: bool = True) -> None:
        what = "ended" if begun else "could not begin: it ended"
        super().__init__(f"fork {fork} {what} with exit code {exit_code}: {last_words or 'it said nothing'}")
        self.fork, self.exit_code, self.last_words, self.begun = fork, exit_code, last_words, begun


def check_anew(pair: Pair, plan: Plan) -> None:
    """Raise ValueError where a fresh process can't have this very pair or an arm's mask builder, before any work.

    A builder of the caller's own is read by a fresh process on trial: it may live in a module that only this one finds.
    """
    if why := why_not_anew(pair):
        raise ValueError(f"{why}; compare in this process, with forks=1.")
    env = inherited()
    for name, build in own_builders(plan).items():
        try:
            work = cloudpickle.dumps(build)
        except Exception as error:  # cloudpickle raises whatever the object's own reduction raises
            why = f"it can't be pickled ({error})"
        else:
            code = "import sys, cloudpickle; cloudpickle.load(sys.stdin.buffer)"
            tried = subprocess.run(
                [sys.executable, "-P", "-c", code], input=work, capture_output=True, env=env, check=False
            )
            if not tried.returncode:
                continue
            why = last_line(tried.stderr)
        raise ValueError(
            f"a fresh process can't have the mask builder {name!r}: {why}; compare in this process, with forks=1."
        )


def why_not_anew(pair: Pair) -> str | None:
    """Why a fresh process can't have this very pair, in a sentence without its full stop; None where it can."""
    if not pair.origin:
        return "this pair was put together by hand, not by eagle_lab.load, so a fresh process can't load it"
    if pair.origin.get("tp_plan") is not None:
        return "a tensor-parallel target lives in the processes of torchrun, so a fresh process can't load it"
    if pair.device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps for later is free for another
    free = free_bytes(pair.device, every=pair.origin.get("device_map") is not None)
    if pair.needed_bytes > free:
        need = f"{format_bytes(free)} free and it needs {format_bytes(pair.needed_bytes)}"
        return f"there is no memory for the pair that a fresh process loads: beside this one, {pair.device} has {need}"
    return None


def own_builders(plan: Plan) -> dict[str, MaskBuilder]:
    """The mask builders of the arms that are the caller's own, by name."""
    names = dict.fromkeys(arm.strategy.mask for arm in plan.arms)
    return {name: MASK_BUILDERS[name] for name in names if own(MASK_BUILDERS[name])}


def inherited() -> dict[str, str]:
    """The environment of a fresh process: this one's, with the places that this one imports from, in their order.

    Raises ValueError where the working folder, which a fresh process works in too, is gone.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise ValueError(
            "the working folder of this process was removed, so a fresh process can't work there; change to another."
        ) from None
    places = dict.fromkeys([*(os.path.normpath(os.path.join(here, place)) for place in sys.path), str(ROOT)])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


@dataclass(frozen=True)
class Work:
    """All that a fresh process needs to take samples: `work_messages` is a function of it alone.

    threads: of torch; builders: mask builders of the caller's own, by name; origin: the arguments of `load`.
    """

    threads: int
    builders: dict[str, MaskBuilder]
    origin: dict[str, Any]
    plan: Plan

    @classmethod
    def of(cls, pair: Pair, plan: Plan) -> Work:
        """The work that this process would do with the pair."""
        return cls(torch.get_num_threads(), own_builders(plan), pair.origin, plan)


def ready(work: Work) -> Pair:
    """The pair that the work needs, loaded anew."""
    MASK_BUILDERS.update(work.builders)
    pair = load(**work.origin, verbose=False)
    for arm in work.plan.arms:
        pair_of(pair, arm)  # heads beside the pair's own
    return pair


def work_messages(work: Work, fork: Fork, pair: Pair | None = None) -> Iterator[Message]:
    """One process's share of the work: {"begun": True} once the pair is there, then the messages of `fork_messages`.

    pair: what `ready` gave; loaded anew where None. A plain function of typed settings, so that any scheduler can run it.
    """
    torch.set_num_threads(work.threads)
    pair = pair or ready(work)
    yield {"begun": True}
    # so that the memory of each process's sessions lies elsewhere, also where processes are copies of one
    ballast = torch.empty(random.Random(f"{work.plan.seed}/{fork.number}").randrange(1, 1 << 20))
    warm_up(pair, work.plan, fork)
    yield from fork_messages(pair, work.plan, fork)
    del ballast


class Workers:
    """Fresh processes for the forks of one plan, one at work at a time: `messages` gives those of a fork.

    On Linux without a GPU one process loads the pair, on one thread, and each fork is a copy of it: it begins within a
    tenth of a second, its sessions are its own, and it shares nothing with the others but where the weights lie, which
    both arms read. Elsewhere a copy isn't safe (a GPU's context, a system's own threads), so each fork is a process that
    loads the pair itself. Each has this process's environment, working folder, `sys.path` and number of threads.
    """

    def __init__(self, pair: Pair, plan: Plan) -> None:
        self.work = Work.of(pair, plan)
        self.copies = sys.platform == "linux" and pair.device.type == "cpu"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def messages(self, fork: Fork) -> Iterator[Message]:
        """The messages of `work_messages`, from a fresh process, after {"process": its id}.

        Raises WorkerDied where it ends early; what it had finished has been yielded by then.
        """
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process and self.process.stdin
        whole = False  # a fork that nobody listens to any more is ended, and with it what it was copied from
        try:
            yield from self._read(fork)
            whole = self.copies
        except WorkerDied:
            whole = self.copies and self.process.poll() is None
            raise
        finally:
            if not whole:
                self._end()

    def _start(self) -> None:
        # The log is no pipe, since a full pipe would stop the process in the middle of a pair.
        self._end()
        reads, low = os.pipe()
        # where this process has no standard output, the pipe would be what the fresh one gets as its own
        writes = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
        self.channel = os.fdopen(reads, "rb")
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        # -P: the working folder is no place to import from, unless it is one here
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "eagle_lab.measure.worker", str(writes), str(int(self.copies))],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[writes],
            env=inherited(),
            start_new_session=True,  # so that its copies end with it
        )
        os.close(writes)
        self._say(self.work)

    def _say(self, what: object) -> None:
        assert self.process and self.process.stdin
        try:
            cloudpickle.dump(what, self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died at once: said by `_read`

    def _end(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdin:
                with suppress(BrokenPipeError):
                    self.process.stdin.close()
            self.channel.close()
            self.log.close()
            self.process = None

    def _read(self, fork: Fork) -> Iterator[Message]:
        assert self.process
        self._say(fork)
        begun, code = False, None
        for line in self.channel:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # killed in the middle of a message
            begun = begun or "begun" in message
            if "end" in message:
                code = message["end"]
                break
            yield {name: READ[name](value) if name in READ else value for name, value in message.items()}
        if code is None:  # the process that copies itself is gone too
            code = self.process.wait() or 1
        if code:
            self.log.seek(0)
            raise WorkerDied(fork.number, code, last_line(self.log.read()), begun)


def last_line(said: bytes) -> str:
    """The last line that isn't empty, such as the one that names an exception; "" where there is none."""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def in_processes(
    pair: Pair, arms: Sequence[Arm], forks: int, measure: Callable[..., T], **options: Any
) -> list[T]:
    """What `measure(pair, number, **options)` gives in each of some fresh processes, one after the other, each with the pair
    loaded anew; in this one where forks is 1.

    arms: what is measured. Raises ValueError where a fresh process can't have this pair or an arm's mask builder, before any
    work, and WorkerDied where one ends early.
    """
    if forks == 1:
        return [measure(pair, 0, **options)]
    plan = Plan(tuple(arms), (), 0)
    renew(pair, plan)  # what this process keeps of its sessions is room for another's
    check_anew(pair, plan)
    work, env = Work.of(pair, plan), inherited()
    return [_in_process(env, number, (work, measure, number, options)) for number in range(forks)]


def _in_process(env: Mapping[str, str], number: int, call: object) -> Any:
    code = f"from {__name__} import answer; answer()"
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-P", "-c", code, file.name]
        done = subprocess.run(
            command, input=cloudpickle.dumps(call), capture_output=True, env=env, check=False
        )
        if done.returncode:
            raise WorkerDied(number, done.returncode, last_line(done.stderr))
        return cloudpickle.load(file)


def answer() -> None:
    """A fresh process of `in_processes`: its call comes by the standard input, and what it gives goes into a file."""
    work, measure, number, options = cloudpickle.load(sys.stdin.buffer)
    torch.set_num_threads(work.threads)
    found = measure(ready(work), number, **options)
    with open(sys.argv[1], "wb") as file:
        cloudpickle.dump(found, file)


def main() -> None:
    """The fresh process itself: with copies, each fork is one of them; else this process is the only fork."""
    channel, copies = int(sys.argv[1]), sys.argv[2] == "1"

    def send(message: Mapping[str, Any]) -> None:
        # on a line of its own, also after one who was killed in the middle of a message
        line = "\n" + json.dumps(message, default=lambda part: part.model_dump(mode="json")) + "\n"
        with os.fdopen(os.dup(channel), "w", encoding="utf-8") as out:
            out.write(line)

    def take(work: Work, fork: Fork, pair: Pair | None) -> None:
        send({"process": os.getpid()})
        for message in work_messages(work, fork, pair):
            send(message)

    if copies:
        torch.set_num_threads(1)  # no thread may live when the process is copied
    work = cloudpickle.load(sys.stdin.buffer)
    if not copies:
        take(work, cloudpickle.load(sys.stdin.buffer), None)
        send({"end": 0})
        return
    pair = ready(work)
    while True:
        try:
            fork = cloudpickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if child := os.fork():
            send({"end": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})
            continue
        code = 1
        try:
            take(work, fork, pair)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
