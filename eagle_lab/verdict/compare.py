"""The comparison: check that both arms agree, measure them in pairs, judge.

`compare` refuses to time arms whose tokens differ. Its record grows on disk with every sample, so a killed run
loses nothing that was measured, and can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch

from eagle_lab import ROOT
from eagle_lab.decode.generate import check_prompt, decode_plain
from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import Decoding, Strategy
from eagle_lab.decode.tree import TREES, TreeShape
from eagle_lab.engines.arm import AUTO, Arm, parse, told, wants_tree, with_tree, written
from eagle_lab.engines.here import base_arm, check_arm, is_beside, is_here, pair_of
from eagle_lab.engines.opened import check_place
from eagle_lab.engines.protocol import Decoded, EngineFailed
from eagle_lab.measure.cluster import Cluster
from eagle_lab.measure.environment import Environment, fingerprint, moved
from eagle_lab.measure.lockstep import Stretch, seconds_a_token
from eagle_lab.measure.outside import Outside
from eagle_lab.measure.pairs import (
    ARMS,
    MAX_FOREIGN_LOAD,
    Fork,
    Message,
    Plan,
    Whole,
    deals,
    fork_messages,
    remaining,
    run_arm,
)
from eagle_lab.measure.records import (
    Difference,
    ForkLost,
    PairsOf,
    Side,
    append,
    check_folder,
    made,
    now,
    read,
    write,
)
from eagle_lab.measure.worker import WorkerDied, Workers, check_anew
from eagle_lab.models.pair import DEFAULT_DRAFT, DEFAULT_TARGET, Pair, project_path
from eagle_lab.models.prompts import Prompt, brought, ready
from eagle_lab.models.targets import check_device, check_dtype
from eagle_lab.models.weights import dtype_name
from eagle_lab.runtime.checks import check
from eagle_lab.runtime.progress import progress as bar_of
from eagle_lab.verdict.agreement import ArmsDisagree, agree, drawn, one_mask, parted, settle
from eagle_lab.verdict.mask_check import fault
from eagle_lab.verdict.record import (
    ArmTold,
    ComparisonRecord,
    Correctness,
    Draws,
    EngineStopped,
    Forecast,
    ForkDied,
    Resumed,
    TreeChosen,
    TreeTried,
)
from eagle_lab.verdict.settings import (
    ComparisonSettings,
    Count,
    Rule,
    again,
    asked,
    check_minutes,
    control_forks,
    rule_of,
)
from eagle_lab.verdict.simulate import CALMER, SLICED, Noise, expected_half_width
from eagle_lab.verdict.stats import Decision, Verdict
from eagle_lab.verdict.summary import step_noise, verdict_of

RESULTS = ROOT / "results"  # a user's own records
# iterations, those of a process, and processes, where nobody says
ITERATIONS, A_FORK, MOST_FORKS = 20, 2, 7
BY_TIME = 100 * MOST_FORKS  # iterations at most where minutes alone are named
CHOOSING = 3  # prompts on which a tree is chosen
WHOLES = 2  # pairs of whole decodes beside cycles in turn
RANDOM_TREES = 100  # each mask builder is held against the reference on so many
DRAWS = 256  # tokens of a sampled arm that are held against the target's distribution


class NothingMeasured(RuntimeError):
    """No pair of a comparison was taken, so there is nothing to judge; the message says why."""


class Interrupted(KeyboardInterrupt):
    """A comparison was interrupted while it measured; path: its record, with every sample that was taken."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} holds what was taken; the same call with resume={str(path)!r} takes the rest"
        )
        self.path = path


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
    baseline: str | Strategy | Arm = "rebuild",
    candidate: str | Strategy | Arm = "incremental",
    prompts: str | Sequence[str | Prompt | Sequence[int]] = "heldout",
    iterations: int | None = None,
    minutes: float | None = None,
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
    pairs_of: PairsOf | None = None,
    cluster: str | None = None,
    results_dir: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    on_forecast: Callable[[Forecast], object] | None = None,
    on_sample: Callable[[Comparison], object] | None = None,
    on_stretch: Callable[[Stretch], object] | None = None,
) -> Comparison:
    """Is `candidate` faster than `baseline` on this machine?

    Args: baseline, candidate: arms (`engines.arm`); the candidate inherits from the baseline what it doesn't name, the
    baseline from the pair, the tree's sizes and the sampling given here; iterations: prompts decoded by both arms, over
    all forks, None = 20, or as many as the minutes hold; minutes: each fork begins no other iteration after its share of
    them, and takes one at least; forks: fresh processes to spread them over, 1 = this process, None = one for each 2
    iterations, at most 7; delta: the smallest relative effect worth acting on, declared here and now; looks: numbers of
    iterations after which the run may stop early, each judged at alpha / len(looks), off by default; spans: instrument
    the (baseline, candidate) arm, to measure what instrumentation costs; pairs_of: what is timed in turn, "cycles" in
    lock-step or whole "decodes"; None = cycles where this process can decode both arms; cluster: take the forks as tasks
    of Ray (`measure.cluster`) on the cluster at HOST:PORT, the one that Ray finds ("auto") or one of this machine's own
    ("local"), each on as many cores or GPUs as the pair has here; resume: an unfinished record of this machine with the
    same settings, whose iterations are kept; on_forecast: given what the run should be able to tell, before it; on_sample:
    given the comparison so far after each iteration, its verdict a running estimate; on_stretch: told of each stretch of
    cycles where this process measures alone; what either raises ends the run.
    Raises: ValueError for a bad setting, before any decode; EngineFailed where an engine can't begin, ClusterFailed where
    a cluster can't or has no room; ArmsDisagree where arms that must give the same text don't; Interrupted, a
    KeyboardInterrupt, with the place of the record.
    """
    plans = partial(
        planned, pair, prompts=prompts, iterations=iterations, minutes=minutes, forks=forks,
        max_new_tokens=max_new_tokens, shape=TreeShape(top_k, depth, total_tokens), sampling=Sampling(temperature, top_p, top_k_sampling),
        pairs_of=pairs_of, delta=delta, alpha=alpha, seed=seed, looks=looks, spans=spans, cluster=cluster is not None,
    )  # fmt: skip
    folder = check_folder(RESULTS if results_dir is None else results_dir)
    start = perf_counter()
    texts, chosen = _with_trees(pair, (baseline, candidate), plans, prompts, resume, progress)
    found = plans(*texts)
    begun = None if resume is None else _begun(Path(resume), found.settings, pair)
    with _source(pair, found, cluster) as source:
        checked, decoded = _check(pair, found, source)
        if begun is None:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
            path = folder / f"comparison-{stamp}.json"
            record = ComparisonRecord(
                **made(str(pair.device)) | {"command": again(found.settings)},
                settings=found.settings,
                correctness=checked,
            )
        else:
            record, path = begun, Path(str(resume))
            record.correctness = checked
        record.events.extend(chosen)
        arms = arms_told(record.environment, found.plan, source)
        if begun is not None and isinstance(source, Outside):
            _check_same(path, record.arms, arms)
        record.arms = arms
        record.forecast = forecast(pair, found, decoded, start)
        if on_forecast is not None and record.forecast is not None:
            on_forecast(record.forecast)
        record.by_blocks = isinstance(source, Outside) and source.by_blocks
        write(record, path)
        try:
            _measure(pair, found.plan, record, path, progress, on_sample, on_stretch, source, start)
        except KeyboardInterrupt:
            raise Interrupted(path) from None
    if not record.iterations:
        raise NothingMeasured(f"no pair was taken: {_last_words(record)}.")
    record.verdict, record.finished = verdict_of(record), now()
    write(record, path)
    return Comparison(record.verdict, record, path)


@dataclass(frozen=True)
class Planned:
    """A comparison that was checked and not begun: what it was asked to do, and what its processes do."""

    settings: ComparisonSettings
    plan: Plan

    @property
    def told(self) -> list[dict[str, Any]]:
        """What each arm is told, by the keys of `engines.arm`."""
        return [told_keys(arm) for arm in self.plan.arms]


def planned(
    pair: Pair,
    baseline: str | Strategy | Arm,
    candidate: str | Strategy | Arm,
    *,
    prompts: str | Sequence[str | Prompt | Sequence[int]],
    iterations: int | None,
    minutes: float | None,
    max_new_tokens: int,
    forks: int | None,
    shape: TreeShape,
    sampling: Sampling,
    pairs_of: PairsOf | None,
    seed: int,
    **rest: Any,
) -> Planned:
    """Check what `compare` is asked without decoding anything; `rest` goes into the settings as it is.

    Raises ValueError, one sentence, for what can't be compared.
    """
    base = base_arm(pair, Arm(shape=shape, sampling=sampling))
    arms, outside = _arms_on(base, pair.device, baseline, candidate)
    for arm in arms:
        if is_here(pair, arm):
            check_arm(pair_of(pair, arm), arm)
        else:
            check_place(arm, pair.device)
    if iterations is None:
        iterations = ITERATIONS if minutes is None else BY_TIME
    check(Count, iterations, "iterations")
    found = ready(pair.tokenizer, pair.config.vocab_size, prompts)
    for prompt in found:
        check_prompt(pair, prompt.ids, max_new_tokens)
    used = found[:iterations]
    count = max(1, min(MOST_FORKS, iterations // A_FORK)) if forks is None else forks
    paired = pairs_of or ("decodes" if outside else "cycles")
    texts = (
        baseline if isinstance(baseline, str) else written(arms[0], base),
        candidate if isinstance(candidate, str) else written(arms[1], arms[0]),
    )
    settings = asked(
        **of_pair(pair), baseline=texts[0], candidate=texts[1], **of_prompts(used), iterations=iterations, minutes=minutes,
        forks=count, control_forks=control_forks(check(Count, count, "forks"), paired), max_new_tokens=max_new_tokens, **asdict(shape),  # type: ignore[call-overload]
        **asdict(sampling), seed=seed, pairs_of=paired, outside=outside, rule=rule_of(*arms),  # type: ignore[call-overload]
        max_foreign_load=MAX_FOREIGN_LOAD, **rest,
    )  # fmt: skip
    plan = Plan(arms, tuple(used), max_new_tokens, seed, settings.spans, settings.pairs_of)
    if (count > 1 or settings.cluster) and not outside:
        check_anew(pair, plan)
    return Planned(settings, plan)


Written: TypeAlias = str | Strategy | Arm


def _arms_on(
    base: Arm, device: torch.device, baseline: Written, candidate: Written
) -> tuple[tuple[Arm, Arm], bool]:
    """Both arms on top of what the baseline inherits, and whether one of them needs a process of its own."""
    one = parse(baseline, base)
    arms = (one, parse(candidate, one))
    return arms, not all(is_beside(base, arm, device) for arm in arms)


def check_before_loading(
    baseline: str, candidate: str, *, target: str | None, device: str | None, dtype: str | None, shape: TreeShape,
    minutes: float | None,
) -> None:  # fmt: skip
    """Refuse what can be seen before the pair is loaded, from arguments of `load` and `compare`.

    Raises ValueError, one sentence, for arms that can't be read or that minutes can't bound.
    """
    place = check_device(device)
    base = Arm(shape=shape, target=target or DEFAULT_TARGET, dtype=dtype_name(check_dtype(dtype, place)))
    _, outside = _arms_on(base, place, _with_largest_tree(baseline), _with_largest_tree(candidate))
    check_minutes(minutes, outside)


def _with_largest_tree(text: Written) -> Written:
    """The arm with the largest tree that `compare` may choose in the place of one that isn't chosen yet."""
    return with_tree(str(text), TREES[63]) if wants_tree(text) else text


def _with_trees(
    pair: Pair,
    texts: tuple[Written, Written],
    plans: Callable[..., Planned],
    prompts: Any,
    resume: str | Path | None,
    progress: bool,
) -> tuple[list[Written], list[TreeChosen]]:
    """The arms with a measured tree where their text leaves it open, and how it was chosen.

    It is chosen on prompts beyond those that are compared, so that it isn't judged by what it was chosen for; on the
    last where there are no others. A run that is resumed keeps its tree.
    """
    found, chosen = list(texts), []
    begun = read(Path(resume), ComparisonRecord).events if resume and any(map(wants_tree, texts)) else []
    known = {event.arm: event.chosen for event in begun if isinstance(event, TreeChosen)}
    for number, name in enumerate(ARMS):
        if not wants_tree(text := found[number]):
            continue
        if name in known:
            found[number] = with_tree(str(text), TREES[known[name].total_tokens])
            continue
        checked = plans(*map(_with_largest_tree, found))  # all, before the measuring
        arm, settings = checked.plan.arms[number], checked.settings
        if not is_here(pair, arm):
            raise ValueError(f"{AUTO} is measured in this process, but the {name} decodes elsewhere.")
        check_arms(pair, replace(checked.plan, arms=(arm, arm)), checked.plan.prompts[0])
        given = ready(pair.tokenizer, pair.config.vocab_size, prompts)
        used = given[settings.iterations :][:CHOOSING] or given[-CHOOSING:]
        with bar_of(len(used), "prompt", f"the {name}'s tree", shown=progress) as bar:
            seconds = seconds_a_token(
                pair, arm, list(TREES.values()), used, settings.max_new_tokens, settings.seed, bar.update
            )
        if all(map(math.isnan, seconds)):
            raise ValueError(
                f"no tree needed a second cycle for {settings.max_new_tokens} tokens, so none can be chosen; raise max_new_tokens."
            )
        tried = [
            TreeTried(**asdict(shape), seconds_a_token=None if math.isnan(took) else took)
            for shape, took in zip(TREES.values(), seconds, strict=True)
        ]
        chosen.append(TreeChosen(arm=name, prompts=[p.id for p in used], tried=tried))
        found[number] = with_tree(str(text), TREES[chosen[-1].chosen.total_tokens])
    return found, chosen


def forecast(pair: Pair, found: Planned, whole: Sequence[Whole], start: float) -> Forecast | None:
    """What a run should be able to tell, by a decode of each arm; None without them, as for arms outside this process.

    start: when the run began, on the clock `perf_counter`; what of its minutes is left counts.
    """
    settings, plan = found.settings, found.plan
    if not whole:
        return None
    cycles = settings.pairs_of == "cycles"
    each = sum(whole[arm].seconds for arm in (plan.sessions if cycles else (0, 1)))
    count = settings.iterations
    if settings.minutes is not None:
        count = max(settings.forks, min(count, int(_spare(settings.minutes, start) / each)))
    if not cycles:
        return Forecast(count=count, seconds_each=each, half_width=None)
    stretches = min(one.counts.cycles for one in whole) - 1
    scatter = step_noise([np.log(one.cycles_s) for one in whole])
    noise = replace(Noise(), cycle=scatter)
    if plan.around(pair):
        noise = replace(SLICED, cycle=max(SLICED.cycle, scatter / CALMER))
    half = expected_half_width(settings.forks, count / settings.forks, stretches, settings.alpha, noise)
    return Forecast(count=count, seconds_each=each, half_width=half if math.isfinite(half) else None)


def _spare(minutes: float, start: float) -> float:
    """Seconds that are left of a run's minutes."""
    return max(0.0, minutes * 60 - (perf_counter() - start))


# what takes the samples of a comparison: other engines, fresh processes here or on a cluster, or this process (None)
Source: TypeAlias = Outside | Workers | Cluster | None


def _source(pair: Pair, found: Planned, cluster: str | None) -> Any:
    if cluster is not None:
        return Cluster(pair, found.plan, cluster)
    if found.settings.outside:
        return Outside(pair, found.plan)
    return nullcontext() if found.settings.forks == 1 else Workers(pair, found.plan)


def _check(pair: Pair, found: Planned, source: Source) -> tuple[Correctness, list[Whole]]:
    prompt = found.plan.prompts[0]
    if isinstance(source, Outside):
        return check_outside(pair, found.plan, prompt, source, found.settings.rule), []
    return check_arms(pair, found.plan, prompt)


def told_keys(arm: Arm) -> dict[str, Any]:
    """What an arm is told, as a record has it: no path of this machine where the checkout's own will do."""
    return {key: project_path(x) if key in ("target", "draft") else x for key, x in told(arm).items()}


def arms_told(here: Environment, plan: Plan, source: Source) -> list[ArmTold]:
    """Both arms for the record: what each was told, and what its engine said of itself; of this code, its commit."""
    found = []
    for number, arm in enumerate(plan.arms):
        keys = told_keys(arm)
        if isinstance(source, Outside):
            engine = source.engine(number)
            found.append(ArmTold(keys=keys, engine=engine.engine, version=engine.version, facts=engine.facts))
        else:
            found.append(ArmTold(keys=keys, engine=arm.engine, version=(here.commit or "unknown")[:9]))
    return found


def _check_same(path: Path, known: Sequence[ArmTold], here: Sequence[ArmTold]) -> None:
    """ValueError where an arm's engine is another than the one that made the pairs of a record."""
    for name, one, other in zip(ARMS, known, here, strict=False):
        was, is_now = ((a.engine, a.version, a.facts.get("commit")) for a in (one, other))
        if was != is_now:
            before, after = (" ".join(str(word) for word in words if word) for words in (was, is_now))
            raise ValueError(f"{path} can't be resumed here: its {name} was {before}, and is {after} now.")


def _last_words(record: ComparisonRecord) -> str:
    last = next(e for e in reversed(record.events) if isinstance(e, ForkDied | ForkLost | EngineStopped))
    if isinstance(last, EngineStopped):
        return last.said.rstrip(".")
    if isinstance(last, ForkLost):
        return f"fork {last.fork}: {last.said or last.why}"
    return str(WorkerDied(last.fork, last.exit_code, last.last_words))


def plan_forks(iterations: int, forks: int, pairs_of: PairsOf = "cycles") -> list[Fork]:
    """The iterations dealt out to forks as evenly as they go.

    Pairs of decodes: then the control forks, spread among them. Cycles: whole decodes beside them, at most one for four
    iterations, in the first forks.
    """
    dealt = deals(iterations, forks)
    wholes = max(1, min(WHOLES, iterations // 4)) if pairs_of == "cycles" else 0
    share = [wholes // forks + (n < wholes % forks) for n in range(forks)]
    main = [Fork(number, deal, wholes=share[number]) for number, deal in enumerate(dealt)]
    extra = control_forks(forks, pairs_of)
    for n in range(extra):
        # in the middle of the run, so that a drift of the machine meets the control as it meets the forks
        place = (n + 1) * forks // (extra + 1) + n
        main.insert(place, Fork(forks + n, dealt[n % forks], control=True))
    return main


def of_pair(pair: Pair) -> dict[str, Any]:
    """The pair as a record has it: names that read the same on every machine, and what else `load` was told."""
    load = {
        name: pair.origin.get(name) for name in ("device_map", "tp_plan", "trust_remote_code", "quantization")
    }
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


def check_arms(pair: Pair, plan: Plan, prompt: Prompt) -> tuple[Correctness, list[Whole]]:
    """Before anything is timed: each mask builder against the reference, each arm against plain decoding.

    Returns what was checked, for the record, and each arm's decode. Raises ArmsDisagree with the place where they differ.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    drafting = [arm for arm in plan.arms if not arm.plain]
    for name in dict.fromkeys(arm.strategy.mask for arm in drafting):
        for _ in range(RANDOM_TREES):
            nodes = int(torch.randint(1, drafting[0].shape.total_tokens + 1, (1,), generator=generator))
            limits = torch.arange(1, nodes + 1)
            parents = (torch.rand(nodes, generator=generator) * limits).long()
            if wrong := fault(MASK_BUILDERS[name], tuple(parents.tolist()), pair.device):
                raise ArmsDisagree(
                    f"mask builder {name!r} differs from the reference: on the tree with parents {parents.tolist()} it {wrong[0]}"
                )
    alone: dict[Decoding, list[int]] = {}
    found, whole = {}, []
    place = plan.prompts.index(prompt)
    for number, (name, arm) in enumerate(zip(ARMS, plan.arms, strict=True)):
        decoding = arm.decoding(plan.max_new_tokens, plan.seed + place)
        # the target alone, through transformers' own attention: that which was asked for, or sdpa
        without = replace(decoding, strategy=Strategy(attention=one_mask(decoding)))
        if without not in alone:
            alone[without] = decode_plain(pair, prompt.ids, without).tokens
        whole.append(run_arm(pair, plan, number, place))
        where = agree(pair, prompt.ids, whole[-1].tokens, alone[without], decoding)
        who = "plain" if arm.plain else str(arm.strategy)
        found[name] = settle(
            where, f"{who!r} and plain decoding decode different tokens on prompt {prompt.id}"
        )
    checked = Correctness(
        random_trees=RANDOM_TREES if drafting else 0, prompt=prompt.id, tokens=len(alone[without]),
        baseline=found["baseline"], candidate=found["candidate"],
    )  # fmt: skip
    return checked, whole


def check_outside(pair: Pair, plan: Plan, prompt: Prompt, source: Outside, rule: Rule) -> Correctness:
    """Before anything is timed: each arm against plain decoding here, where it decodes this pair's target and dtype.

    Returns what was found, for the record. Raises ArmsDisagree where the rule demands the same text.
    """
    found: dict[str, Difference | None] = {}
    unchecked: list[Side] = []
    draws: dict[Side, Draws] = {}
    decodes = [source.decode(number, 0) for number in (0, 1)]
    for number, (name, arm, made_of) in enumerate(zip(ARMS, plan.arms, decodes, strict=True)):
        found[name] = None
        if not _has_target(pair, arm) and (arm.target != pair.target_name or not _draws_alike(arm)):
            unchecked.append(name)
            continue
        if not _draws_alike(arm):
            draws[name] = _draws(pair, plan, number, source)
            continue
        decoding = replace(arm.decoding(plan.max_new_tokens, plan.seed), strategy=Strategy())
        plain = Decoded(seconds=1.0, tokens=tuple(decode_plain(pair, prompt.ids, decoding).tokens))
        judged = _has_arithmetic(pair, arm)
        where = parted(pair, prompt, plain, made_of, decoding, judged)
        if rule == "same text" and judged:
            settle(where, f"{arm.engine} and plain decoding decode different tokens on prompt {prompt.id}")
        found[name] = where
    if rule == "same text" and not any(_has_arithmetic(pair, arm) for arm in plan.arms):
        # both are of the same other target or dtype, so they must agree with each other
        decoding = replace(plan.arms[0].decoding(plan.max_new_tokens, plan.seed), strategy=Strategy())
        where = parted(pair, prompt, decodes[0], decodes[1], decoding, judged=False)
        settle(where, f"the two arms decode different tokens on prompt {prompt.id}")
    return Correctness(
        random_trees=0, prompt=prompt.id, tokens=decodes[0].length, unchecked=tuple(unchecked),
        draws=draws, baseline=found["baseline"], candidate=found["candidate"],
    )  # fmt: skip


def _draws(pair: Pair, plan: Plan, number: int, source: Outside) -> Draws:
    """DRAWS tokens of an arm's decodes against the target's distribution. Raises ArmsDisagree where they don't fit, of an
    engine that was told the target and its dtype; a server's fit is told."""
    arm, taken = plan.arms[number], 0
    decodes: list[tuple[Prompt, Decoded]] = []
    while taken < DRAWS:
        at = len(decodes)
        decodes.append((plan.prompt(at), source.decode(number, at)))
        taken += decodes[-1][1].length
    found = drawn(pair, decodes, arm.sampling, plan.seed)
    if not found.fit and arm.engine != "openai" and not arm.quantization:
        raise ArmsDisagree(
            f"{arm.command or arm.engine} does not sample from the target's distribution: so do {found.tokens} tokens "
            f"say, with p = {found.p_value:.1g}."
        )
    return found


def _has_target(pair: Pair, arm: Arm) -> bool:
    """Whether the arm decodes the pair's target in its dtype and quantization. A server is taken to: how it differs is told."""
    same = (arm.target, arm.dtype, arm.quantization) == (
        pair.target_name, dtype_name(pair.dtype), pair.quantization,
    )  # fmt: skip
    return same or arm.engine == "openai"


def _draws_alike(arm: Arm) -> bool:
    """Whether the arm draws as this kit does, or not at all, so that a seed gives the same text."""
    return arm.sampling.temperature == 0 or (arm.engine == "eagle_lab" and not arm.command)


def _has_arithmetic(pair: Pair, arm: Arm) -> bool:
    """Whether the error of the pair's own arithmetic says how far the arm's choices may lie from the pair's."""
    return _has_target(pair, arm) and not arm.quantization


def between(pair: Pair, plan: Plan, rule: Rule, iteration: int, message: Message) -> Difference | None:
    """Where the arms of an iteration part, None for the same text. Raises ArmsDisagree where the rule demands that and no
    near tie explains it."""
    if "decodes" in message:
        left, right = message["decodes"]
    elif "tokens" in message:
        left, *_, right = (Decoded(seconds=1.0, tokens=tuple(ids)) for ids in message["tokens"])
    else:
        return None
    prompt, (one, other) = plan.prompt(iteration), plan.arms
    alike = one.sampling == other.sampling and all(map(_draws_alike, plan.arms))
    decoding = one.decoding(plan.max_new_tokens, plan.seed + iteration) if alike else None
    # this pair's logits tell any margin, and judge only what its own target decoded in its dtype, by both arms
    judged = all(_has_arithmetic(pair, arm) for arm in plan.arms)
    where = parted(pair, prompt, left, right, decoding, judged)
    if rule == "same text":
        settle(where, f"the two arms decode different tokens on prompt {prompt.id}")
    return where


def _measure(
    pair: Pair,
    plan: Plan,
    record: ComparisonRecord,
    path: Path,
    progress: bool,
    on_sample: Callable[[Comparison], object] | None,
    on_stretch: Callable[[Stretch], object] | None,
    source: Source,
    start: float,
) -> None:
    settings = record.settings
    taken = [*record.iterations, *record.samples]
    work = [remaining(fork, taken) for fork in plan_forks(settings.iterations, settings.forks, plan.pairs_of)]
    through = {p.fork for p in record.parts} | {e.fork for e in record.events if isinstance(e, ForkLost)}
    work = [f for f in work if f.iterations or not (settings.outside or f.control or f.number in through)]
    alone = settings.forks == 1
    total = sum(len(fork.iterations) for fork in work)
    unit = "instance" if plan.pairs_of == "cycles" else "pair"
    begun, budget = perf_counter(), settings.minutes if settings.iterations == BY_TIME else None
    if budget is not None:  # nobody knows how many iterations it holds
        total, unit = max(1, round(_spare(budget, start))), "second"

    def take(message: Message) -> bool:
        counts = _take(pair, plan, message, record, path)
        if counts:
            bar.update(min(total, int(perf_counter() - begun)) - bar.n if budget is not None else 1)
            if on_sample is not None:
                on_sample(Comparison(verdict_of(record), record, path))
        return counts

    with bar_of(total, unit, f"{unit}s", shown=progress) as bar:
        if isinstance(source, Cluster):
            if settings.minutes is not None:
                each = source.shared(len(work), _spare(settings.minutes, start))
                work = [replace(fork, seconds=each) for fork in work]
            for message in source.messages(work, {place.fork for place in record.places}):
                take(message)
            return
        for at, fork in enumerate(work):
            if settings.minutes is not None:
                fork = replace(fork, seconds=_spare(settings.minutes, start) / (len(work) - at))
            try:
                for message in (
                    fork_messages(pair, plan, fork, on_stretch) if source is None else source.messages(fork)
                ):
                    if take(message) and alone and _may_stop(record, 1):
                        break  # forks end their process first, one process alone looks after each iteration
            except WorkerDied as error:
                died = ForkDied(fork=error.fork, exit_code=error.exit_code, last_words=error.last_words)
                append(record, path, "events", died)
                if not error.begun and error.exit_code > 0 and not record.iterations:
                    raise  # nothing has killed it: the next one couldn't begin either
            except EngineFailed as error:
                append(record, path, "events", EngineStopped(fork=fork.number, said=str(error)))
                assert isinstance(source, Outside)
                source.close()
            if not fork.control and _may_stop(record, 1 if alone else len(fork.iterations)):
                record.stopped_early = len(record.iterations)
                if source is None:  # the part is measured though the iterations ended
                    for message in fork_messages(pair, plan, Fork(fork.number, ())):
                        _take(pair, plan, message, record, path)
                return


KEPT = {"part": "parts", "place": "places", "lost": "events"}  # what a message brings beside samples


def _take(pair: Pair, plan: Plan, message: Message, record: ComparisonRecord, path: Path) -> bool:
    """Keep what a message brings on disk; whether it was an iteration of the comparison or its control."""
    for key in KEPT.keys() & message.keys():
        append(record, path, KEPT[key], message[key])
    name = next((name for name in ("instance", "sample") if name in message), None)
    if name is None:
        return False
    sample = message[name]
    if where := between(pair, plan, record.settings.rule, sample.iteration, message):
        sample = sample.model_copy(update={"difference": where})
    append(record, path, f"{name}s", sample)
    return (name == "instance") == (plan.pairs_of == "cycles")


def _may_stop(record: ComparisonRecord, latest: int) -> bool:
    """Whether a declared look was reached by the latest iterations and its share of alpha already decides the verdict."""
    taken = len(record.iterations)
    if not any(taken - latest < look <= taken for look in record.settings.looks[:-1]):
        return False
    found = verdict_of(record.model_copy(update={"stopped_early": taken}))
    return found.decision is not Decision.INCONCLUSIVE
