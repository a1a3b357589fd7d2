"""The command line: `python -m eagle_lab report RECORD.json`, `verdict RECORD.json --fail-on REVERT`, `last`, `readme`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eagle_lab import ROOT
from eagle_lab.measure.old_records import Record, RecordError, read_comparison
from eagle_lab.report.charts.style import picture, ratio_figure
from eagle_lab.report.page import write_report
from eagle_lab.verdict.compare import RESULTS
from eagle_lab.verdict.stats import Decision
from eagle_lab.verdict.summary import sentence, verdict_of

app = typer.Typer(
    add_completion=False,
    help="Does this change make EAGLE-3 decoding faster, and is the answer to be trusted?",
)

# one exit code a decision; 1 and 2 are left to errors and to bad usage
EXIT_CODES = {Decision.REVERT: 10, Decision.INCONCLUSIVE: 11, Decision.NO_DIFFERENCE: 12, Decision.ADOPT: 13}


def _comparison(path: Path) -> Record:
    try:
        record = read_comparison(path)
        verdict_of(record)  # its settings may name a rule that is none
        return record
    except RecordError as error:
        told = str(error)
    except (ValueError, TypeError) as error:
        told = f"{path} can't be judged: {error}"
    typer.echo(f"error: {told}", err=True)
    raise typer.Exit(1)


@app.command()
def report(
    record: Annotated[Path, typer.Argument(help="a comparison's JSON record")],
    out: Annotated[
        Path | None, typer.Option(help="where to write; default: beside the record, with .md")
    ] = None,
) -> None:
    """Write a record's Markdown page, with its chart beside it."""
    found = _comparison(record)
    drawn = picture(ratio_figure(found))
    if drawn is None:
        typer.echo("no Chromium for kaleido here, so the page has no chart.", err=True)
    try:
        typer.echo(write_report(found, out or record.with_suffix(".md"), drawn))
    except OSError as error:
        typer.echo(
            f"error: {error.filename} cannot be written ({error.strerror}); name another with --out.",
            err=True,
        )
        raise typer.Exit(1) from None


@app.command()
def verdict(
    record: Annotated[Path, typer.Argument(help="a comparison's JSON record")],
    fail_on: Annotated[
        list[Decision] | None,
        typer.Option(case_sensitive=False, help="decisions that make the exit code non-zero"),
    ] = None,
) -> None:
    """Print a record's verdict.

    Where --fail-on names the decision, exit with 10 for REVERT, 11 for INCONCLUSIVE, 12 for NO_DIFFERENCE, 13 for ADOPT; else 0.
    """
    found = _comparison(record)
    typer.echo(sentence(found))
    judged = verdict_of(found)
    for reason in judged.reasons:
        typer.echo(f"  {reason}")
    raise typer.Exit(EXIT_CODES[judged.decision] if judged.decision in (fail_on or []) else 0)


@app.command()
def last(results: Annotated[Path, typer.Option(help="the folder of the records")] = RESULTS) -> None:
    """Print the verdict and the places of the newest comparison."""
    files = sorted(results.glob("comparison-*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        typer.echo(f"error: there is no comparison in {results} yet.", err=True)
        raise typer.Exit(1)
    found = _comparison(files[-1])
    typer.echo(f"verdict:  {sentence(found)}")
    typer.echo(f"record:   {files[-1]}")
    page = files[-1].with_suffix(".md")
    if page.exists():
        typer.echo(f"report:   {page}")


@app.command()
def readme(
    check: Annotated[
        bool, typer.Option("--check", help="change nothing; exit with 1 where a block is stale")
    ] = False,
    root: Annotated[
        Path, typer.Option(help="the folder with README.md, data/results/ and notebooks/")
    ] = ROOT,
) -> None:
    """Render the README's measured blocks from the records under data/results/."""
    # imported late: it brings most of the package, and a pipeline that asks for a verdict shall not wait for it
    from eagle_lab.report.readme import ReadmeError, render, stale

    path = root / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
        old = stale(text, root)
        if old and not check:
            path.write_text(render(text, root), encoding="utf-8")
    except (OSError, ReadmeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if old and check:
        typer.echo(f"stale: {', '.join(old)}; run python -m eagle_lab readme", err=True)
        raise typer.Exit(1)
    typer.echo(f"rendered anew: {', '.join(old)}" if old else "every block is what the records render")


if __name__ == "__main__":
    app()
