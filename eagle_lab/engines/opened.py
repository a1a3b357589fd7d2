"""Arms outside this process, opened: a worker or a server, ready to decode one prompt at a time."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from eagle_lab import ROOT
from eagle_lab.engines.arm import Arm
from eagle_lab.engines.place import MARK, in_order, place
from eagle_lab.engines.protocol import Decoded, EngineFailed, Worker
from eagle_lab.engines.revision import code_of, commit_of
from eagle_lab.models import targets
from eagle_lab.models.checkpoints import read_config, read_draft_json
from eagle_lab.models.dialects import recognise, unsayable
from eagle_lab.models.pair import SHAPE, Pair
from eagle_lab.models.prompts import Prompt

WORKER = Path(__file__).with_name("worker.py")
VISIBLE = "CUDA_VISIBLE_DEVICES"
FOREIGN = ("official", "vllm")  # code that takes the first GPU that it sees, whatever the device's number
Facts = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Opened:
    """An arm that is ready. decode: of a prompt, the most new tokens, a seed, and whether it may compile; process: the one
    that decodes, None where it isn't of this machine or can't be seen; facts: what the engine says of itself, for the
    record."""

    engine: str
    version: str
    decode: Callable[[Prompt, int, int | None, bool], Decoded]
    process: int | None
    facts: Facts = field(default_factory=dict)


def check_place(arm: Arm, device: torch.device) -> None:
    """ValueError, one sentence, where the arm's interpreter or code isn't there, or where this code can't quantize as the
    arm names on the device, before anything is started."""
    if arm.engine == "eagle_lab" and not arm.command:
        if arm.quantization and arm.tensor_parallel_size > 1:
            raise ValueError(
                f"quantization={arm.quantization} is for a target on one GPU, and tensor_parallel_size is "
                f"{arm.tensor_parallel_size}."
            )
        targets.check_quantization(arm.quantization, device, targets.check_dtype(arm.dtype or None, device))
    if arm.engine != "openai":
        command_of(arm)
    if arm.code:
        commit_of(arm.code)


@contextmanager
def opened(pair: Pair, arm: Arm, context: int) -> Iterator[Opened]:
    """The arm, started and loaded; ended when the block ends.

    context: positions that the longest decode needs. Raises ValueError for an arm that can't be meant, and EngineFailed,
    one sentence, where its engine can't serve it.
    """
    with _server(pair, arm) if arm.engine == "openai" else _worker(pair, arm, context) as found:
        yield found


@contextmanager
def _server(pair: Pair, arm: Arm) -> Iterator[Opened]:
    from eagle_lab.engines.server import Server  # httpx, which no other arm needs

    with Server(arm, arm.target if arm.target != pair.target_name else None) as server:
        facts: Facts = {"model": server.model, "tells_cycles": server.counts}
        yield Opened("openai", "a server", server.decode, server.process(), facts)


@contextmanager
def _worker(pair: Pair, arm: Arm, context: int) -> Iterator[Opened]:
    facts: Facts = {}
    with in_order(), place() as home:
        folder = ""
        if arm.code:
            code = code_of(arm.code, home)
            folder = str(code.folder)
            facts |= {"commit": code.commit, "dirty": code.dirty, "changes_left_out": code.left_out}
        told = tell(pair, arm, context, folder)
        if arm.engine == "official":
            if not arm.plain:
                check_official(told["draft"], pair.config.num_hidden_layers)
            told["target"] = indexed(told["target"], home)
        name = arm.command or f"engine={arm.engine}" + (f",code={arm.code}" if arm.code else "")
        env = environment(arm, pair.device, folder) | {MARK: str(home)}
        with Worker(name, command_of(arm), env) as worker:
            hello = worker.hello(told)
            facts |= worker.load(told).facts

            def decode(prompt: Prompt, max_new_tokens: int, seed: int | None, first: bool = False) -> Decoded:
                found = worker.decode(prompt.ids, max_new_tokens, seed, first)
                most = pair.config.vocab_size
                if arm.target == pair.target_name and max(found.tokens or (0,)) >= most:
                    raise EngineFailed(
                        f"{name} gave the id {max(found.tokens or ())}, but the target has {most} tokens."
                    )
                return found

            yield Opened(hello.engine, hello.version, decode, worker.process.pid, facts)


def command_of(arm: Arm) -> list[str]:
    """The words that start the arm's worker. Raises ValueError for an interpreter that isn't there."""
    if arm.command:
        return shlex.split(arm.command)
    if not arm.python:
        return [sys.executable, str(WORKER), arm.engine]
    found = shutil.which(os.path.expanduser(arm.python))  # a path stays a link: it is the environment's
    if found is None:
        raise ValueError(f"python is {arm.python!r}, which is no program here.")
    return [os.path.abspath(found), str(WORKER), arm.engine]


def environment(arm: Arm, device: torch.device, folder: str = "") -> dict[str, str]:
    """The environment of the arm's worker: this one's, with as many threads, and the arm's code first on PYTHONPATH.

    An engine of another project has no PYTHONPATH at all: what this process imports must not reach it. Of the GPUs it
    sees that of `device` alone, as its number 0; processes that split a target on the CPU see none.
    """
    threads = str(torch.get_num_threads())
    found = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    if arm.engine == "eagle_lab" and not arm.command:
        found["PYTHONPATH"] = os.pathsep.join([folder or str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    elif arm.python:
        found.pop("PYTHONPATH", None)
    if arm.engine in FOREIGN and device.index is not None:
        found[VISIBLE] = visible_gpu(device.index, found.get(VISIBLE))
    if arm.tensor_parallel_size > 1 and device.type == "cpu":
        found[VISIBLE] = ""
    return found


def visible_gpu(index: int, visible: str | None) -> str:
    """CUDA's name of this process's GPU `index`: where CUDA_VISIBLE_DEVICES names GPUs, by number or UUID, its entry."""
    return visible.split(",")[index].strip() if visible else str(index)


def tell(pair: Pair, arm: Arm, context: int, folder: str = "") -> dict[str, Any]:
    """What a worker is told of the arm: names made paths where its engine reads folders."""
    named = arm.engine == "eagle_lab" and not arm.command or arm.target.startswith(SHAPE)
    target = arm.target if named else str(targets.find_target(arm.target or None))
    draft = arm.draft if named or arm.plain or not arm.draft else str(targets.find_draft(arm.draft))
    # this code's own workers take the pair's very GPU; those that split a target count theirs, others see no other one
    own = arm.engine == "eagle_lab" and arm.tensor_parallel_size == 1
    device = str(pair.device) if own else pair.device.type
    return {
        "target": target, "draft": draft, "device": device, "dtype": arm.dtype, "plain": arm.plain,
        "quantization": arm.quantization, "strategy": str(arm.strategy), "shape": asdict(arm.shape),  # type: ignore[call-overload]
        "sampling": asdict(arm.sampling), "code": folder, "context": context, "threads": torch.get_num_threads(),  # type: ignore[call-overload]
        "ends": sorted(pair.eos), "tensor_parallel_size": arm.tensor_parallel_size,
    }  # fmt: skip


def check_official(draft: str, layers: int) -> None:
    """ValueError for a head of a target of so many layers with parts that the official code would leave out: it would draft
    worse, and nothing say so."""
    speculators = recognise(read_draft_json(draft)) == "speculators"
    unknown = (
        ["the speculators dialect"] if speculators else unsayable(read_config(draft, layers), "official")
    )
    if unknown:
        raise ValueError(
            f"engine=official can't read the head in {draft}: its code knows nothing of {', '.join(unknown)}; name another "
            "as draft=, such as one that `python -m eagle_lab train` makes without norms."
        )


def indexed(target: str, home: Path) -> str:
    """The target's folder, or one of links to its files with the index that the official code looks for."""
    single = Path(target) / "model.safetensors"
    if not single.is_file() or (Path(target) / "model.safetensors.index.json").exists():
        return target
    folder = home / "target"
    folder.mkdir()
    for file in Path(target).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    with safe_open(single, framework="pt") as weights:
        places = dict.fromkeys(weights.keys(), single.name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)
