"""A fork: a fresh process that takes samples. JMH's word, and JMH's reason.

Layout, allocator and clocks give each process a bias that interleaving can't cancel, so a verdict rests on several.
`worker_messages` is the side that starts one. Run as a module, this file is the process itself: it reads its work from
the standard input and writes one JSON line a message to a descriptor of its own. Its standard output and error belong
to whatever library writes there, and go to a log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import cloudpickle
import torch

from eagle_lab import ROOT
from eagle_lab.decode.masks import MASK_BUILDERS, MaskBuilder, own
from eagle_lab.measure.pairs import Fork, Message, Plan, fork_messages, warm_up
from eagle_lab.measure.records import PartCalls, Sample
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.targets import format_bytes, free_bytes

READ = {"sample": Sample.model_validate, "part": PartCalls.model_validate}


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
    for name, build in own_builders(plan).items():
        try:
            work = cloudpickle.dumps(build)
        except Exception as error:  # cloudpickle raises whatever the object's own reduction raises
            why = f"it can't be pickled ({error})"
        else:
            code = "import sys, cloudpickle; cloudpickle.load(sys.stdin.buffer)"
            tried = subprocess.run(
                [sys.executable, "-P", "-c", code],
                input=work,
                capture_output=True,
                env=inherited(),
                check=False,
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
    """The environment of a fresh process: this one's, with the places that this one imports from, in their order."""
    places = dict.fromkeys([*(os.path.abspath(place) for place in sys.path), str(ROOT)])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def worker_messages(pair: Pair, plan: Plan, fork: Fork) -> Iterator[Message]:
    """The messages of `fork_messages`, from a fresh process that loads the pair anew.

    Two come before them: {"process": id} and, once it has loaded the pair, {"begun": True}. It has this process's
    environment, working folder, `sys.path` and number of threads. Raises WorkerDied where it ends early; what it had
    finished has been yielded by then.
    """
    work = (torch.get_num_threads(), own_builders(plan), pair.origin, plan, fork)
    reads, writes = os.pipe()
    # -P: the working folder is no place to import from, unless it is one here. The log is no pipe, since a full pipe
    # would stop the process in the middle of a pair.
    with os.fdopen(reads, "rb") as channel, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "eagle_lab.measure.worker", str(writes)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[writes],
            env=inherited(),
        )
        os.close(writes)
        try:
            yield {"process": process.pid}
            yield from _read(process, channel, log, cloudpickle.dumps(work), fork.number)
        finally:
            process.kill()
            process.wait()


def _read(
    process: subprocess.Popen[bytes], channel: IO[bytes], log: IO[bytes], work: bytes, number: int
) -> Iterator[Message]:
    assert process.stdin
    try:
        process.stdin.write(work)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at once: said below
    begun = ended = False
    for line in channel:
        if not line.endswith(b"\n"):
            break  # killed in the middle of a message
        message = json.loads(line)
        begun, ended = begun or "begun" in message, "end" in message
        if not ended:
            yield {name: READ[name](value) if name in READ else value for name, value in message.items()}
    code = process.wait()
    if not ended or code:
        log.seek(0)
        raise WorkerDied(number, code, last_line(log.read()), begun)


def last_line(said: bytes) -> str:
    """The last line that isn't empty, such as the one that names an exception; "" where there is none."""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def main() -> None:
    """The fresh process itself."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as channel:

        def send(message: Mapping[str, Any]) -> None:
            channel.write(json.dumps(message, default=lambda part: part.model_dump(mode="json")) + "\n")
            channel.flush()

        threads, builders, origin, plan, fork = cloudpickle.load(sys.stdin.buffer)
        torch.set_num_threads(threads)
        MASK_BUILDERS.update(builders)
        pair = load(**origin)
        send({"begun": True})
        warm_up(pair, plan, fork)
        for message in fork_messages(pair, plan, fork):
            send(message)
        send({"end": True})


if __name__ == "__main__":
    main()
