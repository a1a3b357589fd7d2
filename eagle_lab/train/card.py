"""A trained head in words: the card that is shipped with it, and the sentences and tables of the notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eagle_lab import ROOT
from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record, read

RESULTS = ROOT / "data" / "results"


def thin(history: Sequence[dict[str, Any]], most: int = 200) -> list[dict[str, Any]]:
    """At most so many entries of a history, evenly chosen, the last one kept."""
    step = max(1, -(-len(history) // most))
    return [*history[:-1:step], history[-1]] if history else []


def grown(record: Record, smaller: Record | None = None) -> list[dict[str, Any]]:
    """How τ grew with the text: answer_tokens and tau of each head, the one with the least text first.

    `smaller`: the record of a run on a part of the text, where the head's own run trained none on shares.
    """
    rows = [row for r in (record, smaller) if r for row in (*r.get("growth", []), _point(r))]
    return sorted({row["answer_tokens"]: row for row in rows}.values(), key=lambda row: row["answer_tokens"])


def _point(record: Record) -> dict[str, Any]:
    return {"answer_tokens": record["settings"]["answer_tokens"], "tau": record["acceptance"]["tau"]}


def shipped_growth() -> list[dict[str, Any]]:
    """`grown` of the head that comes with the kit, from its committed records."""
    return grown(read(RESULTS / "train-h100.json"), read(RESULTS / "train-growth-h100.json"))


def growth_words(rows: Sequence[dict[str, Any]]) -> str:
    """Whether more text would help, from the last two heads."""
    if len(rows) < 2:
        return "How τ grows with the amount of text was not measured for this head."
    before, last = rows[-2:]
    times, more = last["answer_tokens"] / before["answer_tokens"], last["tau"] - before["tau"]
    told = "more of both would still help" if more > 0.1 else "more would hardly help"
    return (
        f"Heads trained on less text, with as many passes over it, so for fewer steps. {times:.1f} times the text and the "
        f"steps brought {more:+.2f} at the end: {told}."
    )


def card(record: Record, name: str, smaller: Record | None = None) -> str:
    """The card of a head from its record: how it was made, where, how long it took, and what was measured.

    `smaller`: see `grown`.
    """
    s, found, where = record["settings"], record["acceptance"], machine_key(record["environment"])
    table = "\n".join(f"| {k} | {v:.2f} |" for k, v in found["by_category"].items())
    sizes = "\n".join(f"| {k} | {v:.2f} |" for k, v in found["by_tree_size"].items())
    depths = "\n".join(f"| {d['depth']} | {d['accepted']:.2f} | {d['reached']} |" for d in found["by_depth"])
    seconds = record["seconds"]
    rows = grown(record, smaller)
    growth = growth_words(rows)
    if len(rows) > 1:
        lines = "\n".join(f"| {row['answer_tokens']:,} | {row['tau']:.2f} |" for row in rows)
        growth = f"{growth}\n\n| answer tokens of text | τ |\n|---|---|\n{lines}"
    if smaller:
        growth += f"\n\nThe heads on less text were made by\n```\n{smaller['command']}\n```"
    along = "\n".join(
        f"| {v['step']:,} | {v['accuracy'][0]:.3f} | {v['accuracy'][-1]:.3f} | {v['chain']:.2f} |"
        for v in record["validation"]
    )
    how = f" --device {'cuda' if record['environment'].get('gpu') else 'cpu'}"
    how += " --replay" if found["settings"].get("replay") else ""
    if found["settings"].get("strategy", "rebuild") != "rebuild":
        how += f" --strategy {found['settings']['strategy']}"
    return f"""# {name}: an EAGLE-3 draft head for {s["target"]}

τ = **{found["tau"]:.2f}** (greedy, top_k {found["settings"]["top_k"]}, depth {found["settings"]["depth"]}, \
{found["settings"]["total_tokens"]} draft nodes, {found["settings"]["prompts"]} held-out prompts, \
{found["settings"]["max_new_tokens"]} new tokens each, bonus token counted).

Measured by `python -m eagle_lab.measure.acceptance --draft data/{name}{how}`.

## How it was made
```
{record["command"]}
```
{s["answer_tokens"]:,} answer tokens in {s["texts"]:,} texts that the target wrote itself, \
{seconds["training"] / 60:.0f} minutes of training-time test ({s["training"]["ttt_steps"]} steps) on {where}; \
text {seconds["text"] / 60:.0f} minutes. All settings are in the record. The head drafts from \
{s["training"]["draft_vocab"]:,} tokens, the most frequent of those answers.{_compiled(record)}

On texts set aside, along the run (a chain is a tree of one branch):

| step | first draft right | draft {s["training"]["ttt_steps"]} right | τ of a chain |
|---|---|---|---|
{along}

{growth}

## Acceptance
| category | τ |
|---|---|
{table}

| draft nodes | τ |
|---|---|
{sizes}

| depth | accepted where reached | cycles that reached it |
|---|---|---|
{depths}
"""


def _compiled(record: Record) -> str:
    """What stands in the card of a run whose first step's compilation counted as training."""
    took = record["history"][0]["seconds"]
    if record["settings"]["training"]["minutes"] is None or took < 10:
        return ""
    return (
        f" Compiling the first step took {took:.0f} s, which counted against the minutes and the schedule of the learning "
        "rate in this run; the same command now leaves it out, and trains for that much longer."
    )


def text_words(record: Record) -> str:
    """What the head was trained on, in one paragraph."""
    s = record["settings"]
    return (
        f"The target wrote {s['answer_tokens']:,} answer tokens in {s['texts']:,} texts. "
        f"The head drafts from {s['training']['draft_vocab']:,} tokens, the most frequent of those answers."
    )


def training_words(record: Record) -> str:
    """How the loss and the accuracy moved, in one paragraph."""
    history = record["history"]
    few = max(1, len(history) // 20)

    def mean(entries: Sequence[dict[str, Any]], read: Any) -> float:
        return sum(read(entry) for entry in entries) / len(entries)

    loss = [mean(part, lambda e: e["loss"]) for part in (history[:few], history[-few:])]
    first = [mean(part, lambda e: e["accuracy"][0]) for part in (history[:few], history[-few:])]
    last = mean(history[-few:], lambda e: e["accuracy"][-1])
    moved = "fell" if loss[1] < loss[0] else "did not fall"
    return (
        f"The loss {moved}: {loss[0]:.2f} at the start, {loss[1]:.2f} at the end of {history[-1]['step']:,} steps. "
        f"The first draft is the target's token {first[1]:.0%} of the time ({first[0]:.0%} at the start), the draft of "
        f"step {len(history[-1]['accuracy'])} {last:.0%}."
    )


def acceptance_words(record: Record) -> str:
    """τ and what it means, in one paragraph."""
    found = record["acceptance"]
    s = found["settings"]
    return (
        f"**τ = {found['tau']:.2f}**: a cycle commits that many tokens on average over {s['prompts']} prompts of "
        f"{s['max_new_tokens']} new tokens, greedy, with {s['total_tokens']} draft nodes. Without a head it would be 1."
    )


def acceptance_rows(record: Record) -> list[dict[str, Any]]:
    """One row for each size of tree: draft nodes and τ."""
    return [
        {"draft nodes": int(n), "τ": round(v, 2)} for n, v in record["acceptance"]["by_tree_size"].items()
    ]
