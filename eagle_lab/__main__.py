"""Every command of the kit: `python -m eagle_lab --help` lists them.

What a command needs is imported when it runs: a pipeline that asks for a verdict does not wait for torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from eagle_lab import ROOT

if TYPE_CHECKING:
    from eagle_lab.verdict.record import ComparisonRecord

HELP = """Does this change make EAGLE-3 decoding faster, and is the answer to be trusted?

Begin with `make compare`, or with `compare --candidate doubling`; `last` prints its verdict again.
Records of comparisons lie in results/, those of named machines in data/results/."""

# one exit code a decision; 1 and 2 are left to errors and to bad usage
EXIT_CODES = {"REVERT": 10, "INCONCLUSIVE": 11, "NO_DIFFERENCE": 12, "ADOPT": 13}
PLACE, RECORDS = ROOT / "results", ROOT / "data" / "results"
COMPARE, MAKE, KEEP = "Compare", "Measure a machine, train a head", "Maintain"


class Commands(TyperGroup):
    """Commands whose errors, where they are meant for the reader, are one line and exit code 1; a bug keeps its traceback."""

    def invoke(self, context: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(context)
        except Exception as error:
            ours = type(error).__module__.startswith("eagle_lab.")
            if not isinstance(error, ValueError | OSError) and not ours:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, help=HELP)
record_app = typer.Typer(
    no_args_is_help=True, help="Measure this machine; the notebooks read what is written."
)
app.add_typer(record_app, name="record", rich_help_panel=MAKE)

Arm = Annotated[str, typer.Option(help="an arm, such as doubling,total_tokens=31 or plain; docs/arms.md")]
File = Annotated[Path, typer.Argument(help="a comparison's JSON record", metavar="RECORD.json")]
Target = Annotated[
    str | None, typer.Option(help="hub name, folder or shape:NAME; the embedded one if left out")
]
Draft = Annotated[str | None, typer.Option(help="hub name or folder; the target's own if left out")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; the best one if left out")]
Dtype = Annotated[str | None, typer.Option(help="such as float32; fits the device if left out")]
Prompts = Annotated[str, typer.Option(help="a split (train, validation, heldout), all, a category, or ids")]
Pairs = Annotated[int, typer.Option(help="prompts that both arms of a comparison decode")]
Turns = Annotated[
    int, typer.Option(help="prompts on which all rungs take turns, and pairs of each tree and batch")
]
Runs = Annotated[int, typer.Option(help="short runs of each planted delay under each load")]
RunSeconds = Annotated[float, typer.Option(help="of a run; its processes share them")]
Loads = Annotated[
    list[float] | None,
    typer.Option(help="share of the time a program beside takes one core; 0 and 0.5 if left out"),
]
Forks = Annotated[int, typer.Option(help="fresh processes; below 5 a verdict is provisional")]
Iterations = Annotated[
    int | None, typer.Option(help="prompts that both arms decode; 20, or what the minutes hold, if left out")
]
Budget = Annotated[float | None, typer.Option(help="begin no other iteration after so many minutes")]
Processes = Annotated[
    int | None, typer.Option(help="fresh processes; one for 2 iterations, up to 7, if left out")
]
Nodes = Annotated[int, typer.Option(help="draft nodes of a tree, root not counted")]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily")]
Among = Annotated[int, typer.Option(help="sample among so many tokens; 0 for all")]
Delta = Annotated[float, typer.Option(help="smallest relative effect worth acting on")]
Looks = Annotated[list[int] | None, typer.Option(help="iterations after which it may stop early; repeatable")]
Results = Annotated[Path | None, typer.Option(help="where the record goes; results if left out")]
Dry = Annotated[bool, typer.Option("--dry-run", help="check both arms and say what would be done")]
Resume = Annotated[Path | None, typer.Option(help="the record of a comparison that was cut off")]
OnCluster = Annotated[
    str | None, typer.Option(help="take the forks by Ray: HOST:PORT, auto or local; docs/cluster.md")
]
Decisions = Annotated[
    list[str] | None, typer.Option(metavar="DECISION", help=", ".join(EXIT_CODES) + "; repeatable")
]
Page = Annotated[Path | None, typer.Option(help="where to write; beside the record, with .md, if left out")]
Written = Annotated[Path | None, typer.Option(help="write a record to this file")]
Other = Annotated[str | None, typer.Option(help="another head, compared with --draft by prompt")]
Beside = Annotated[str | None, typer.Option(help="another arm, whose stages are told beside rebuild's")]
Sizes = Annotated[list[int] | None, typer.Option(help="draft nodes of a tree; repeatable")]
Strategy = Annotated[str, typer.Option(help="doubling,runtime=cuda_graph is fast on a GPU")]
Work = Annotated[Path, typer.Option(help="work folder; the same command started again goes on there")]
Answers = Annotated[int, typer.Option(help="answer tokens that the target writes")]
Setting = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="repeatable; --settings lists them")
]
Growth = Annotated[list[float] | None, typer.Option(help="a share of the text to train on too; repeatable")]
Texts = Annotated[Path | None, typer.Option(help="folder of the text; in the work folder if left out")]
Minutes = Annotated[float | None, typer.Option(help="stop by then, with everything written")]
Finished = Annotated[Path, typer.Argument(help="the work folder of a finished training")]
Works = Annotated[list[Path], typer.Argument(help="their work folders, the reference first")]
Rates = Annotated[list[Path] | None, typer.Option(help="a training whose rate to keep; repeatable")]
Shipped = Annotated[Path, typer.Option(help="folder for the head and its card")]
Kept = Annotated[Path | None, typer.Option(help="where the record goes; in data/results if left out")]
Listed = Annotated[bool, typer.Option(help="list the settings of --text and --training, and end")]
Targets = Annotated[str, typer.Option(help="all, default, or one target such as shape:llama-3.1-8b")]
Batches = Annotated[str, typer.Option(help="batch sizes, with commas")]
Prefixes = Annotated[
    str | None,
    typer.Option(help="tokens before the cycles, with commas; up to 32,768, as far as they fit, if left out"),
]
Fastest = Annotated[str | None, typer.Option(help="how both decode; the fastest of the device if left out")]
Timed = Annotated[int, typer.Option(help="cycles of each way that are timed after each prefix")]
Compiled = Annotated[bool, typer.Option(help="runtime=compile too, which takes minutes to prepare")]
Timings = Annotated[int, typer.Option(help="timings of each mask builder at each size")]
Decodes = Annotated[int, typer.Option(help="timed pairs of whole decodes; 0 for none")]
Baseline = Annotated[str, typer.Option(help="strategy of the whole decodes")]
Candidate = Annotated[str | None, typer.Option(help="the baseline with the best builder if left out")]
Folder = Annotated[Path, typer.Option(help="where the records go", show_default="data/results")]
Check = Annotated[bool, typer.Option("--check", help="change nothing; exit with 1 where a page is stale")]
Drawn = Annotated[
    bool, typer.Option("--pictures", help="first draw the notebooks' pictures anew from their charts")
]
Root = Annotated[Path, typer.Option(help="the folder with README.md, docs/, data/results/ and notebooks/")]


def _comparison(path: Path) -> ComparisonRecord:
    from eagle_lab.measure.records import OtherKind, read
    from eagle_lab.report.words import render
    from eagle_lab.verdict.record import ComparisonRecord

    try:
        return read(path, ComparisonRecord)
    except OtherKind as other:
        raise ValueError(render("other_kind.j2", path=path, kind=other.kind).strip()) from None


def _tell(path: Path) -> None:
    from eagle_lab.report.page import sentence
    from eagle_lab.report.words import change
    from eagle_lab.verdict.summary import factors, verdict_of

    found, page = _comparison(path), path.with_suffix(".md")
    typer.echo(f"verdict:  {sentence(found, verdict_of(found))}")
    if two := factors(found):
        typer.echo(f"factors:  cycles needed {change(two.cycles)}, time of a cycle {change(two.cycle_s)}")
    for name, file in (("record", path), ("report", page)):
        if file.exists():
            typer.echo(f"{name}:   {_near(file)}")


def _near(file: Path) -> Path:
    """The file's path from where one stands, where it lies below."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


@app.command(rich_help_panel=COMPARE)
def compare(
    baseline: Arm = "rebuild", candidate: Arm = "incremental", target: Target = None, draft: Draft = None,
    device: Device = None, dtype: Dtype = None, prompts: Prompts = "heldout", iterations: Iterations = None,
    minutes: Budget = None, forks: Processes = None, max_new_tokens: int = 50, top_k: int = 10, depth: int = 7, total_tokens: Nodes = 63,
    temperature: Temperature = 0.0, top_p: float = 1.0, top_k_sampling: Among = 0, delta: Delta = 0.01,
    alpha: float = 0.05, seed: int = 0, looks: Looks = None, results_dir: Results = None, resume: Resume = None,
    cluster: OnCluster = None, dry_run: Dry = False,
) -> None:  # fmt: skip
    """Time two arms in pairs and judge: is the candidate faster than the baseline?

    The candidate inherits from the baseline what it doesn't name.
    """
    import eagle_lab
    from eagle_lab.decode.tree import TreeShape
    from eagle_lab.report.page import forecast_words
    from eagle_lab.verdict.compare import Interrupted, check_before_loading, planned

    shape = TreeShape(top_k, depth, total_tokens)
    check_before_loading(
        baseline, candidate, target=target, device=device, dtype=dtype, shape=shape, minutes=minutes
    )
    pair = eagle_lab.load(target, draft, device, dtype)
    told: dict[str, Any] = {
        "prompts": prompts, "iterations": iterations, "minutes": minutes, "forks": forks, "alpha": alpha, "delta": delta,
        "max_new_tokens": max_new_tokens, "seed": seed, "looks": looks or (),
    }  # fmt: skip
    if dry_run:
        from eagle_lab.decode.sampling import Sampling
        from eagle_lab.report.words import render

        found = planned(
            pair, baseline, candidate, shape=shape,
            sampling=Sampling(temperature, top_p, top_k_sampling), pairs_of=None, cluster=cluster is not None, **told,
        )  # fmt: skip
        typer.echo(render("planned.j2", s=found.settings, arms=found.told))
        return
    try:
        done = eagle_lab.compare(
            pair, baseline=baseline, candidate=candidate, top_k=top_k, depth=depth, total_tokens=total_tokens,
            temperature=temperature, top_p=top_p, top_k_sampling=top_k_sampling, results_dir=results_dir, resume=resume,
            cluster=cluster, **told, on_forecast=lambda found: typer.echo(f"expected: {forecast_words(found)}"),
        )  # fmt: skip
    except Interrupted as stop:
        near = _near(stop.path)
        typer.echo(
            f"stopped: {near} holds what was taken; the same command with --resume {near} takes the rest.",
            err=True,
        )
        raise typer.Exit(130) from None  # a shell's code for Ctrl-C
    _tell(done.path)
    if not done.verdict.pairs:
        raise typer.Exit(1)  # nothing was measured


@app.command(rich_help_panel=COMPARE)
def last(results: Annotated[Path, typer.Option(help="the folder of the records")] = PLACE) -> None:
    """Print the verdict and the places of the newest comparison."""
    if results.is_file():
        raise ValueError(
            f"{results} is a file; name the folder of the records, or give the file to `verdict`."
        )
    files = sorted(results.glob("comparison-*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"there is no comparison in {results} yet; `make compare` makes one.")
    _tell(files[-1])


@app.command(rich_help_panel=COMPARE)
def report(record: File, out: Page = None) -> None:
    """Write a comparison's Markdown page, with its chart beside it."""
    from eagle_lab.report.charts.comparison import ratio_figure
    from eagle_lab.report.charts.style import picture
    from eagle_lab.report.page import write_report

    found = _comparison(record)
    drawn = picture(ratio_figure(found))
    if drawn is None:
        typer.echo("no Chromium for kaleido here, so the page has no chart.", err=True)
    try:
        typer.echo(write_report(found, out or record.with_suffix(".md"), drawn))
    except OSError as error:
        place = f"{error.filename} cannot be written ({error.strerror})"
        raise ValueError(f"{place}; name another with --out.") from None


@app.command(rich_help_panel=COMPARE)
def verdict(record: File, fail_on: Decisions = None) -> None:
    """Print a comparison's verdict and its reasons.

    Where --fail-on names the decision, exit with 10 for REVERT, 11 for INCONCLUSIVE, 12 for NO_DIFFERENCE, 13 for ADOPT; else 0.
    Where no pair is left to judge, exit with 1.
    """
    from eagle_lab.report.page import sentence, told
    from eagle_lab.verdict.summary import verdict_of

    named = {name.upper() for name in fail_on or ()}
    if unknown := sorted(named - set(EXIT_CODES)):
        raise typer.BadParameter(f"{', '.join(unknown)} is no decision; there are {', '.join(EXIT_CODES)}.")
    found = _comparison(record)
    judged = verdict_of(found)
    typer.echo(sentence(found, judged))
    for reason in told(found, judged):
        typer.echo(f"  {reason}")
    if not judged.pairs:
        raise typer.Exit(1)  # nothing was measured: no choice of decisions may hide that
    raise typer.Exit(EXIT_CODES[judged.decision] if judged.decision in named else 0)


@app.command(rich_help_panel=COMPARE)
def history(
    folder: Annotated[Path, typer.Argument(help="a folder of records, searched below too")] = RECORDS,
    html: Annotated[Path | None, typer.Option(help="write all of it as one HTML page, with filters")] = None,
    machine: Annotated[str | None, typer.Option(help="only machines whose name holds this")] = None,
    arm: Annotated[str | None, typer.Option(help="only comparisons with an arm that holds this")] = None,
) -> None:
    """Tell what a folder's records say: the latest of each trend, and what changed."""
    from eagle_lab.report import history as words
    from eagle_lab.verdict import history as found

    rows, skipped = found.load(folder)
    rows = found.chosen(rows, machine, arm)
    if html is None:
        typer.echo(words.overview(rows, skipped))
        typer.echo(words.trend_words(found.trends(rows)))
    else:
        from eagle_lab.report.charts.history import html as page

        html.write_text(page(rows, skipped), encoding="utf-8")
        typer.echo(html)


@app.command(rich_help_panel=COMPARE)
def acceptance(
    target: Target = None, draft: Draft = None, device: Device = None, prompts: Prompts = "heldout",
    max_new_tokens: int = 128, sizes: Sizes = None, strategy: Strategy = "rebuild", beside: Other = None,
    temperature: Temperature = 0.0, out: Written = None,
) -> None:  # fmt: skip
    """Count how many tokens of a draft head are accepted, by category, depth and tree size.

    With --beside, a second head decodes the same prompts and the difference of τ is paired by prompt.
    """
    from eagle_lab.measure import acceptance as measured
    from eagle_lab.measure.records import check_folder, made, write
    from eagle_lab.models.pair import load
    from eagle_lab.report.training import accepted_words as words

    if out:  # before minutes of decoding
        check_folder(out.parent)
        if out.is_dir():
            raise ValueError(f"{out} is a folder; name a file for the record.")
    names, heads = [], []
    for name in (draft, beside) if beside else (draft,):
        pair = load(target, name, device)
        names.append(Path(pair.draft_name).name)
        heads.append(measured.acceptance(
            pair, prompts, max_new_tokens, sizes=sizes or measured.SIZES, strategy=strategy, temperature=temperature
        ))  # fmt: skip
    paired = None
    if beside:
        gap = measured.difference(*heads)
        paired = measured.Beside(draft=names[1], acceptance=heads[1], difference=gap)
    record = measured.AcceptanceRecord(
        **made(pair.device.type), target=Path(pair.target_name).name, draft=names[0], acceptance=heads[0],
        beside=paired,
    )  # fmt: skip
    if out:
        write(record, out)
    typer.echo(words(record))


@app.command(rich_help_panel=MAKE)
def train(
    target: Target = None, out: Work = Path("results/draft"), device: Device = None, answer_tokens: Answers = 20_000_000,
    texts: Texts = None, text: Setting = None, training: Setting = None, growth: Growth = None, prompts: Prompts = "heldout",
    max_new_tokens: int = 128, sizes: Sizes = None, minutes: Minutes = None, settings: Listed = False,
) -> None:  # fmt: skip
    """Train a draft head: the target writes text, the head learns from it, its acceptance is measured.

    --prompts, --max-new-tokens and --sizes say how it is measured, as `acceptance` takes them.
    With --minutes it stops in time, exits with 0 and says what is left. `torchrun` in place of `python` trains on several
    GPUs of one host. `ship` takes the finished head into the kit.
    """
    from eagle_lab.measure.acceptance import SIZES
    from eagle_lab.train.make_draft import make_draft
    from eagle_lab.train.text import TextSettings
    from eagle_lab.train.train import TrainSettings

    if settings:
        for name, kind in (("text", TextSettings), ("training", TrainSettings)):
            typer.echo(" ".join((kind.__doc__ or "").split()))
            for field in dataclasses.fields(kind):
                typer.echo(f"  --{name} {field.name}={field.default}")
        return
    done = make_draft(
        target, out, answer_tokens, parsed(TextSettings, text), parsed(TrainSettings, training), device,
        prompts, max_new_tokens=max_new_tokens, sizes=sizes or SIZES, growth=growth or (), texts=texts, minutes=minutes,
    )  # fmt: skip
    if done.stage != "done":
        what = "answer tokens" if done.stage == "text" else "steps"
        typer.echo(f"stopped: {done.left:,} {what} are left; the same command goes on.")
    elif done.record is not None:
        found = done.record.acceptance
        typer.echo(f"τ = {found.tau:.2f} on {found.settings.prompts} prompts: {out / 'record.json'}")
        typer.echo(f"head: {out / 'training' / 'draft'}, as an arm: draft={out / 'training' / 'draft'}")


@app.command(rich_help_panel=MAKE)
def ship(out: Finished, draft: Shipped = ROOT / "data" / "draft-smollm2-135m", record: Kept = None) -> None:
    """Take a finished head of `train` into the kit: the checkpoint, its card and its record.

    For the kit's own head the recorded trees (about 3 minutes), README and docs are made anew too. It ends by saying what
    must still be measured again.
    """
    from eagle_lab.measure.records import RESULTS
    from eagle_lab.models.pair import DEFAULT_DRAFT
    from eagle_lab.report import training

    place = record or RESULTS / "train-h100.json"
    kits = draft.resolve() == DEFAULT_DRAFT.resolve()
    training.ship(out, draft, place)
    if kits:
        record_trees()
        docs(check=False, root=ROOT)
    typer.echo(training.shipped_words(training.measured_with(draft.name, place.parent), everything=kits))


def parsed(kind: type, words: list[str] | None) -> Any:
    """A settings object from words such as "steps=200"; ValueError names what is unknown or wrong."""
    from pydantic import TypeAdapter, ValidationError

    from eagle_lab.runtime.checks import nearest, sentence

    known = [field.name for field in dataclasses.fields(kind)]
    given = dict(word.partition("=")[::2] for word in words or ())
    for name in given:
        if name not in known:
            raise ValueError(
                f"setting {name!r} is unknown{nearest(name, known)}; there are {', '.join(known)}."
            )
    try:
        return TypeAdapter(kind).validate_strings(given)
    except ValidationError as error:
        raise ValueError(sentence(error)) from None


@record_app.command("all")
def record_all(device: str = "cuda", target: Targets = "all", results_dir: Folder = RECORDS) -> None:
    """Every kind of record of this machine, one after the other, with the usual settings of each."""
    from eagle_lab.studies.record import record

    record(device, target, results_dir)


@record_app.command("profile")
def record_profile(
    device: str = "cuda", target: Targets = "all", draft: Draft = None, max_new_tokens: int = 50, results_dir: Folder = RECORDS,
    beside: Beside = None,
) -> None:  # fmt: skip
    """Where a decode's time goes, stage by stage, with planted delays: profile-<machine>-<target>.json."""
    from eagle_lab.engines.here import base_arm
    from eagle_lab.report.profile import beside_table
    from eagle_lab.studies.profile import arm_beside, get_prompts, profile_beside
    from eagle_lab.studies.record import each_target, machine_profile

    def measured(pair: Any) -> Any:
        if beside:  # refused before minutes of measuring
            arm_beside(pair, beside, base_arm(pair))
        found = machine_profile(pair, max_new_tokens)
        if beside:
            second = profile_beside(pair, found, beside, get_prompts(pair, len(found.settings.prompts)))
            typer.echo(beside_table(found, second, ("rebuild", beside)))
        return found

    each_target(measured, device, target, draft, results_dir)


@record_app.command("seed")
def record_seed(
    device: str = "cuda", target: Targets = "all", draft: Draft = None, max_new_tokens: int = 50, iterations: Pairs = 20,
    forks: Forks = 5, results_dir: Folder = RECORDS,
) -> None:  # fmt: skip
    """The first investigation's experiment, done again: seed-<machine>-<target>.json."""
    from eagle_lab.studies.record import each_target
    from eagle_lab.studies.seed import redo

    options = {"iterations": iterations, "max_new_tokens": max_new_tokens, "forks": forks}
    for one in each_target(lambda pair: redo(pair, **options), device, target, draft, results_dir):
        typer.echo(f"{one.settings.target}: {one.comparison.verdict}")


@record_app.command("ladder")
def record_ladder(
    device: str = "cuda", target: Targets = "all", draft: Draft = None, iterations: Turns = 8, forks: Forks = 1,
    max_new_tokens: int = 48, batches: Batches = "1,2,4,8,16,32", compiled: Compiled = False, results_dir: Folder = RECORDS,
) -> None:  # fmt: skip
    """Optimizations one at a time, tree sizes and batches: optimize-<machine>-<target>.json."""
    from eagle_lab.studies.record import each_target, machine_ladder

    options: dict[str, Any] = {
        "iterations": iterations, "forks": forks, "max_new_tokens": max_new_tokens, "compiled": compiled,
        "batches": [int(n) for n in batches.split(",")],
    }  # fmt: skip
    each_target(lambda pair: machine_ladder(pair, results_dir, **options), device, target, draft, results_dir)


@record_app.command("contexts")
def record_contexts(
    device: str = "cuda", target: Targets = "all", draft: Draft = None, prefixes: Prefixes = None, strategy: Fastest = None,
    cycles: Timed = 24, seed: int = 0, results_dir: Folder = RECORDS,
) -> None:  # fmt: skip
    """A cycle's time after prefixes of several lengths, beside its floor there: contexts-<machine>-<target>.json."""
    from eagle_lab.measure.records import record_path, write
    from eagle_lab.report.ladder import contexts_table
    from eagle_lab.studies.profile import stated_acceptance
    from eagle_lab.studies.record import each_target
    from eagle_lab.studies.scaling import contexts, lengths

    given = lengths(prefixes) if prefixes else None
    for one in each_target(
        lambda pair: contexts(
            pair, given, strategy=strategy, cycles=cycles, seed=seed, stated=stated_acceptance(pair),
            keep=lambda record: write(record, record_path(record, results_dir)),
        ), device, target, draft, results_dir,
    ):  # fmt: skip
        typer.echo(contexts_table(one))


@record_app.command("sweep")
def record_sweep(
    device: str = "cpu", iterations: Timings = 60, pairs: Decodes = 20, forks: Forks = 1, new_tokens: int = 32,
    baseline: Baseline = "rebuild", candidate: Candidate = None, results_dir: Folder = RECORDS,
) -> None:  # fmt: skip
    """Every mask builder at every tree size, alone and in whole decodes: sweep-<device>.json."""
    from eagle_lab.report.sweep import whole
    from eagle_lab.studies.sweep import record_machine

    found, path = record_machine(
        device, iterations=iterations, decodes=pairs, forks=forks, max_new_tokens=new_tokens,
        baseline=baseline, candidate=candidate, folder=results_dir,
    )  # fmt: skip
    without = sum(cell.missing is not None for cell in found.cells)
    typer.echo(f"{path.name}: {len(found.cells)} cells, {without} of them without a time")
    typer.echo(whole(found))


@record_app.command("tries")
def record_tries(trainings: Works, rate: Rates = None, out: Kept = None) -> None:
    """Finished trainings that differ in one setting, as one record: tries-h100.json."""
    from eagle_lab.measure.records import RESULTS, write
    from eagle_lab.report.training import tries_words
    from eagle_lab.train.tries import gather

    found = gather(trainings, rate or ())
    write(found, out or RESULTS / "tries-h100.json")
    typer.echo(tries_words(found))


@record_app.command("operators")
def record_operators(
    device: str = "cuda", target: str = "", draft: Draft = None, strategy: str = "rebuild", total_tokens: Nodes = 63,
    results_dir: Folder = RECORDS,
) -> None:  # fmt: skip
    """The operators and kernels of a cycle, by torch.profiler: operators-<machine>-<target>.json.

    Under `torchrun` the processes share the target, with a GPU each, and the first one's are kept.
    """
    import os

    from eagle_lab.decode.strategy import Decoding
    from eagle_lab.measure.records import check_folder, write
    from eagle_lab.models import parallel
    from eagle_lab.models.pair import load
    from eagle_lab.report.ladder import kernels
    from eagle_lab.studies.operators import operators_path, operators_record
    from eagle_lab.studies.record import MOST_KERNELS, quick_prompts

    folder, decoding = check_folder(results_dir), Decoding.of(64, strategy, total_tokens=total_tokens)
    pair = load(target or None, draft, device, tp_plan="auto" if "RANK" in os.environ else None)
    found = operators_record(pair, quick_prompts(pair), decoding, top=MOST_KERNELS)
    if parallel.rank() == 0:
        write(found, operators_path(found, folder))
        typer.echo(kernels(found))


@record_app.command("instances")
def record_instances(
    device: str = "cuda", target: str = "", draft: Draft = None, strategy: str = "rebuild", minutes: float = 2.0,
    max_new_tokens: int = 50, results_dir: Folder = RECORDS,
) -> None:  # fmt: skip
    """How small a difference this machine can tell, by planted delays in lock-step: instances-<machine>-<target>.json."""
    from eagle_lab.decode.strategy import Decoding
    from eagle_lab.measure.records import check_folder, record_path, write
    from eagle_lab.models.pair import load
    from eagle_lab.report.instances import instances_table
    from eagle_lab.studies.record import quick_prompts
    from eagle_lab.verdict.instances import take_instances

    folder, decoding = check_folder(results_dir), Decoding.of(max_new_tokens, strategy)
    pair = load(target or None, draft, device)
    found = take_instances(
        pair, quick_prompts(pair), decoding, minutes=minutes,
        on_instance=lambda record: write(record, record_path(record, folder)),
    )  # fmt: skip
    typer.echo(instances_table(found))


@record_app.command("calibration")
def record_calibration(
    device: Device = None, target: Target = None, draft: Draft = None, strategy: str = "rebuild", runs: Runs = 10,
    seconds: RunSeconds = 20.0, forks: Forks = 5, load: Loads = None, max_new_tokens: int = 32, total_tokens: Nodes = 15,
    depth: int = 4, top_k: int = 4, results_dir: Folder = RECORDS,
) -> None:  # fmt: skip
    """What short runs find of planted delays of 0, 1, 2 and 5%, quiet and loaded: calibration-<machine>-<target>.json.

    Started again with the same settings it goes on where it was cut off. 80 runs (10 of each delay under each load) take about 50 minutes.
    """
    from eagle_lab.decode.strategy import Decoding
    from eagle_lab.measure.environment import fingerprint
    from eagle_lab.measure.records import check_folder, kept_at
    from eagle_lab.models import pair as models
    from eagle_lab.report.calibration import of_runs
    from eagle_lab.studies.record import quick_prompts
    from eagle_lab.verdict.calibration import LOADS, calibrate

    folder = check_folder(results_dir)
    decoding = Decoding.of(max_new_tokens, strategy, total_tokens=total_tokens, depth=depth, top_k=top_k)
    pair = models.load(target, draft, device)
    path = kept_at("calibration", fingerprint(str(pair.device)), pair.target_name, folder)
    found = calibrate(
        pair, quick_prompts(pair), decoding, path, runs=runs, seconds=seconds, forks=forks, loads=load or LOADS,
        on_run=lambda record: typer.echo(f"{len(record.runs)} runs, the last in {record.runs[-1].seconds:.0f} s"),
    )  # fmt: skip
    typer.echo(of_runs(found))


@record_app.command("grid")
def record_grid(
    file: Annotated[Path, typer.Argument(help="what to compare, as YAML; docs/cluster.md")],
    cluster: OnCluster = None, results_dir: Results = None,
) -> None:  # fmt: skip
    """Compare arms x trees x prompts, or train a head by several settings: grid-NAME.json.

    Started again it goes on where it was cut off.
    """
    from eagle_lab.measure.records import write
    from eagle_lab.report.training import tries_words
    from eagle_lab.report.words import render
    from eagle_lab.studies.grid import cells_of, read_grid, run_grid
    from eagle_lab.train.tries import Tries, run_tries

    grid = read_grid(file)
    if isinstance(grid, Tries):
        place = (results_dir or PLACE) / f"grid-{grid.name}"
        trained = run_tries(grid, place, cluster)
        write(trained, place.with_suffix(".json"))
        typer.echo(tries_words(trained))
        return
    found = run_grid(
        grid, results_dir or PLACE, cluster=cluster,
        on_cell=lambda cell: typer.echo(f"{cell.arm}, {cell.tree.total_tokens} nodes, {cell.prompts}: {cell.verdict or cell.missing}"),
    )  # fmt: skip
    typer.echo(render("grid.md.j2", grid=found, count=len(cells_of(grid))))


@record_app.command("trees")
def record_trees() -> None:
    """Draft trees of the shipped pair for the sweep, about 3 minutes on two cores: data/trees/."""
    from eagle_lab.measure.recorded_trees import record
    from eagle_lab.models.pair import load

    path = record(load(device="cpu"))
    typer.echo(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


@app.command(rich_help_panel=KEEP)
def docs(check: Check = False, pictures: Drawn = False, root: Root = ROOT) -> None:
    """Render the generated parts of README.md and docs/ from the records in data/results/."""
    from eagle_lab.report import readme

    if pictures:
        typer.echo(f"drawn: {', '.join(path.name for path in readme.pictures(root))}")
    old = readme.stale(root)
    if not check:
        for page, text in old.items():
            (root / page).write_text(text, encoding="utf-8")
    if old and check:
        typer.echo(f"stale: {', '.join(old)}; run python -m eagle_lab docs", err=True)
        raise typer.Exit(1)
    typer.echo(f"rendered anew: {', '.join(old)}" if old else "every page is what the records render")


if __name__ == "__main__":
    app()
