"""The comparison: check that both arms agree, measure them in pairs, judge.

`compare` refuses to time arms whose tokens differ. Its record grows on disk with every sample, so a killed run
loses nothing that was measured, and can be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eagle_lab import ROOT
from eagle_lab.decode.generate import check_prompt, decode, decode_plain
from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.session import check_early
from eagle_lab.decode.strategy import Decoding, Strategy
from eagle_lab.decode.strategy import check as check_strategy
from eagle_lab.measure.environment import fingerprint, moved
from eagle_lab.measure.pairs import MAX_FOREIGN_LOAD, Fork, Message, Plan, fork_messages
from eagle_lab.measure.records import Difference, PairsOf, append, check_folder, made, now, read, write
from eagle_lab.measure.worker import WorkerDied, Workers, check_anew
from eagle_lab.models.pair import DEFAULT_DRAFT, DEFAULT_TARGET, Pair, project_path
from eagle_lab.models.prompts import Prompt, brought, prepare
from eagle_lab.models.weights import dtype_name
from eagle_lab.runtime.checks import check
from eagle_lab.verdict.agreement import ArmsDisagree, agree, one_mask, settle
from eagle_lab.verdict.mask_check import fault
from eagle_lab.verdict.record import ComparisonRecord, Correctness, ForkDied, Resumed
from eagle_lab.verdict.settings import ComparisonSettings, Count, again, asked, control_forks
from eagle_lab.verdict.stats import Decision, Verdict
from eagle_lab.verdict.summary import verdict_of

RESULTS = ROOT / "results"  # a user's own records
A_FORK, MOST_FORKS = 3, 7  # iterations a process, and processes, where nobody says
WHOLES = 3  # pairs of whole decodes beside cycles in turn
RANDOM_TREES = 100  # each mask builder is held against the reference on so many


class NothingMeasured(RuntimeError):
    """No pair of a comparison was taken, so there is nothing to judge; the message says why."""


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: the verdict, and the record that it was derived from with its place on disk."""

    verdict: Verdict
    record: ComparisonRecord
    path: Path

    def __str__(self) -> str:
        s = self.record.settings
        return f"{s.candidate} against {s.baseline}: {self.verdict}"


def compare(
    pair: Pair,
    *,
    baseline: str = "rebuild",
    candidate: str = "incremental",
    prompts: str | Sequence[str | Prompt | Sequence[int]] = "heldout",
    iterations: int = 20,
    max_new_tokens: int = 50,
    forks: int | None = None,
    top_k: int = 10,
    depth: int = 7,
    total_tokens: int = 63,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k_sampling: int = 0,
    delta: float = 0.01,
    alpha: float = 0.05,
    seed: int = 0,
    looks: Sequence[int] = (),
    spans: tuple[bool, bool] = (False, False),
    pairs_of: PairsOf = "cycles",
    results_dir: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    on_sample: Callable[[Comparison], object] | None = None,
) -> Comparison:
    """Is `candidate` faster than `baseline` on this pair and machine?

    Args: iterations: prompts decoded by both arms, over all forks; forks: fresh processes to spread them over, 1 = this
    process, None = one for each 3 iterations, at most 7; delta: the smallest relative effect worth acting on, declared
    here and now; looks: numbers of iterations after which the run may stop early, each judged at alpha / len(looks), off
    by default; spans: instrument the (baseline, candidate) arm, to measure what instrumentation costs; pairs_of: what is
    timed in turn, "cycles" in lock-step or whole "decodes"; resume: an unfinished record of this machine with the same
    settings, whose iterations are kept; on_sample: given the comparison so far after each iteration, its verdict a
    running estimate; what it raises ends the run.
    Raises: ValueError for a bad setting, before any decode; ArmsDisagree where the arms' tokens differ.
    """
    sizes = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k_sampling": top_k_sampling}
    arms = [Decoding.of(max_new_tokens, name, **sizes, **sampling) for name in (baseline, candidate)]  # type: ignore[arg-type]
    for arm in arms:
        check_early(pair, check_strategy(arm.strategy, pair.device), total_tokens + 1)
        pair.check_attention(arm.strategy.attention)
    check(Count, iterations, "iterations")
    ready = prepare(pair.tokenizer, prompts)
    for prompt in ready:
        check_prompt(pair, prompt.ids, max_new_tokens)
    used = ready[:iterations]
    count = max(1, min(MOST_FORKS, iterations // A_FORK)) if forks is None else forks
    settings = asked(
        **of_pair(pair), baseline=baseline, candidate=candidate, **of_prompts(used), iterations=iterations,
        forks=count, control_forks=control_forks(check(Count, count, "forks"), pairs_of), max_new_tokens=max_new_tokens,
        **sizes, **sampling, delta=delta, alpha=alpha, seed=seed, looks=looks, spans=spans, pairs_of=pairs_of,
        max_foreign_load=MAX_FOREIGN_LOAD,
    )  # fmt: skip
    folder = check_folder(RESULTS if results_dir is None else results_dir)
    plan = Plan((arms[0], arms[1]), tuple(used), seed, settings.spans, settings.pairs_of)
    if count > 1:
        check_anew(pair, plan)
    begun = None if resume is None else _begun(Path(resume), settings, pair)
    checked = check_arms(pair, plan, used[0])
    if begun is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
        path = folder / f"comparison-{stamp}.json"
        record = ComparisonRecord(
            **made(str(pair.device)) | {"command": again(settings)}, settings=settings, correctness=checked
        )
    else:
        record, path = begun, Path(str(resume))
        record.correctness = checked
    write(record, path)
    _measure(pair, plan, record, path, progress, on_sample)
    if not record.iterations:
        died = next(e for e in reversed(record.events) if isinstance(e, ForkDied))
        raise NothingMeasured(f"no pair was taken: {WorkerDied(died.fork, died.exit_code, died.last_words)}.")
    record.verdict, record.finished = verdict_of(record), now()
    write(record, path)
    return Comparison(record.verdict, record, path)


def plan_forks(iterations: int, forks: int, pairs_of: PairsOf = "cycles") -> list[Fork]:
    """The iterations dealt out to forks as evenly as they go.

    Pairs of decodes: then the control forks, spread among them. Cycles: whole decodes beside them, at most one for four
    iterations, in the first forks.
    """
    deals = [tuple(range(iterations * n // forks, iterations * (n + 1) // forks)) for n in range(forks)]
    wholes = max(1, min(WHOLES, iterations // 4)) if pairs_of == "cycles" else 0
    share = [wholes // forks + (n < wholes % forks) for n in range(forks)]
    main = [Fork(number, deal, wholes=share[number]) for number, deal in enumerate(deals)]
    extra = control_forks(forks, pairs_of)
    for n in range(extra):
        # in the middle of the run, so that a drift of the machine meets the control as it meets the forks
        place = (n + 1) * len(deals) // (extra + 1) + n
        main.insert(place, Fork(forks + n, deals[n % forks], control=True))
    return main


def of_pair(pair: Pair) -> dict[str, Any]:
    """The pair as a record has it: names that read the same on every machine, and what else `load` was told."""
    load = {name: pair.origin.get(name) for name in ("device_map", "tp_plan", "trust_remote_code")}
    return {
        "target": project_path(pair.target_name),
        "draft": project_path(pair.draft_name),
        "embedded": pair.target_name == DEFAULT_TARGET and Path(pair.draft_name) == DEFAULT_DRAFT,
        "device": str(pair.device),
        "dtype": dtype_name(pair.dtype),
        "load": {name: x if isinstance(x, str | bool) else str(x) for name, x in load.items() if x},
    }


def of_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Prompts by id, and the token ids of those that aren't the kit's own: a record must be enough to decode them again."""
    return {"prompts": [p.id for p in prompts], "own_prompts": brought(prompts)}


def _begun(path: Path, settings: ComparisonSettings, pair: Pair) -> ComparisonRecord:
    """An unfinished record whose pairs can be kept; ValueError says why they can't."""
    record = read(path, ComparisonRecord)
    before, wanted = record.settings.model_dump(), settings.model_dump()
    changed = [name for name in wanted if before[name] != wanted[name]]
    if changed:
        raise ValueError(f"{path} can't be resumed: its {', '.join(changed)} differ from this comparison's.")
    here = fingerprint(str(pair.device))
    if others := moved(record.environment, here):
        raise ValueError(f"{path} can't be resumed here: it was begun with {'; '.join(others)}.")
    record.events.append(Resumed(samples=len(record.iterations), commit=here.commit, dirty=here.dirty))
    record.stopped_early = record.finished = record.verdict = None
    return record


def check_arms(pair: Pair, plan: Plan, prompt: Prompt) -> Correctness:
    """Before anything is timed: both mask builders against the reference, both arms against plain decoding.

    Returns what was checked, for the record. Raises ArmsDisagree with the place where they differ.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    for name in dict.fromkeys(arm.strategy.mask for arm in plan.arms):
        for _ in range(RANDOM_TREES):
            nodes = int(torch.randint(1, plan.arms[0].shape.total_tokens + 1, (1,), generator=generator))
            limits = torch.arange(1, nodes + 1)
            parents = (torch.rand(nodes, generator=generator) * limits).long()
            if wrong := fault(MASK_BUILDERS[name], tuple(parents.tolist()), pair.device):
                raise ArmsDisagree(
                    f"mask builder {name!r} differs from the reference: on the tree with parents {parents.tolist()} it {wrong[0]}"
                )
    alone: dict[Decoding, list[int]] = {}
    found = {}
    for name, arm in zip(("baseline", "candidate"), plan.arms, strict=True):
        told = replace(arm, seed=plan.seed)
        # the target alone, through transformers' own attention: that which was asked for, or sdpa
        without = replace(told, strategy=Strategy(attention=one_mask(arm)))
        if without not in alone:
            alone[without] = decode_plain(pair, prompt.ids, without).tokens
        plain = alone[without]
        tokens = decode(pair, prompt.ids, told, record=False).tokens
        found[name] = difference(
            pair, prompt, told, tokens, plain, f"{str(arm.strategy)!r} and plain decoding"
        )
    return Correctness(random_trees=RANDOM_TREES, prompt=prompt.id, tokens=len(plain), **found)


def difference(
    pair: Pair, prompt: Prompt, decoding: Decoding, left: list[int], right: list[int], who: str
) -> Difference | None:
    """None for the same tokens, or where a near tie of logits parted them; ArmsDisagree for anything else."""
    where = agree(pair, prompt.ids, left, right, decoding)
    return settle(where, f"{who} decode different tokens on prompt {prompt.id}")


def _measure(
    pair: Pair,
    plan: Plan,
    record: ComparisonRecord,
    path: Path,
    progress: bool,
    on_sample: Callable[[Comparison], object] | None,
) -> None:
    settings = record.settings
    work = [_left(fork, record) for fork in plan_forks(settings.iterations, settings.forks, plan.pairs_of)]
    alone = settings.forks == 1
    total = sum(len(fork.iterations) for fork in work)
    unit = "instance" if plan.pairs_of == "cycles" else "pair"
    with (
        tqdm(total=total, unit=unit, desc=f"{unit}s", disable=not progress) as bar,
        nullcontext() if alone else Workers(pair, plan) as workers,
    ):
        for fork in work:
            if not fork.iterations and (fork.control or fork.number in {p.fork for p in record.parts}):
                continue
            try:
                for message in fork_messages(pair, plan, fork) if workers is None else workers.messages(fork):
                    if not _take(pair, plan, message, record, path):
                        continue
                    bar.update()
                    if on_sample is not None:
                        on_sample(Comparison(verdict_of(record), record, path))
                    if alone and _may_stop(record, 1):
                        break  # forks end their process first, one process alone looks after each iteration
            except WorkerDied as error:
                died = ForkDied(fork=error.fork, exit_code=error.exit_code, last_words=error.last_words)
                append(record, path, "events", died)
                if not error.begun and error.exit_code > 0 and not record.iterations:
                    raise  # nothing has killed it: the next one couldn't begin either
            if not fork.control and _may_stop(record, 1 if alone else len(fork.iterations)):
                record.stopped_early = len(record.iterations)
                if alone:  # the part is measured though the iterations ended
                    for message in fork_messages(pair, plan, Fork(fork.number, ())):
                        _take(pair, plan, message, record, path)
                return


def _left(fork: Fork, record: ComparisonRecord) -> Fork:
    """What of a fork a record lacks."""
    done = {(s.fork, s.iteration) for s in [*record.iterations, *record.samples]}
    beside = sum(s.fork == fork.number for s in record.samples)
    left = tuple(i for i in fork.iterations if (fork.number, i) not in done)
    return replace(fork, iterations=left, wholes=max(0, fork.wholes - beside))


def _take(pair: Pair, plan: Plan, message: Message, record: ComparisonRecord, path: Path) -> bool:
    """Keep a message's sample or part on disk; whether it was an iteration of the comparison or its control."""
    if "part" in message:
        append(record, path, "parts", message["part"])
    name = next((name for name in ("instance", "sample") if name in message), None)
    if name is None:
        return False
    sample = message[name]
    if "tokens" in message:
        left, right = message["tokens"]
        decoding = replace(plan.arms[0], seed=plan.seed + sample.iteration)
        where = difference(pair, plan.prompt(sample.iteration), decoding, left, right, "the two arms")
        sample = sample.model_copy(update={"difference": where})
    append(record, path, f"{name}s", sample)
    return (name == "instance") == (plan.pairs_of == "cycles")


def _may_stop(record: ComparisonRecord, latest: int) -> bool:
    """Whether a declared look was reached by the latest iterations and its share of alpha already decides the verdict."""
    taken = len(record.iterations)
    if not any(taken - latest < look <= taken for look in record.settings.looks[:-1]):
        return False
    return (
        verdict_of(record.model_copy(update={"stopped_early": taken})).decision is not Decision.INCONCLUSIVE
    )
