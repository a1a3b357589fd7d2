"""The first investigation's tables and words, on the committed records."""

from __future__ import annotations

import pandas as pd

from eagle_lab.measure.records import RESULTS, committed
from eagle_lab.report import seed as report
from eagle_lab.studies.seed import SeedRecord, published


def test_arithmetic_claims_and_verdicts(snapshot):
    seeds = committed(SeedRecord, RESULTS)
    snapshot(report.arithmetic(published()), "seed_arithmetic.md")
    snapshot(report.claims(published(), seeds), "seed_claims.md")
    snapshot(report.redone(seeds), "seed_redone.md")


def test_without_records_the_words_say_what_is_missing(snapshot, tmp_path):
    snapshot(report.claims(published(), {}, tmp_path) + report.redone({}), "seed_without_records.md")


def test_tables_of_the_redone_experiment():
    seeds = committed(SeedRecord, RESULTS)
    shown = pd.DataFrame(report.overview(seeds)).set_index(["record", "metric"])["change"]
    assert shown["h100-llama-3.1-8b", "E2E latency, ms"] == "+9.0% [-2.9, +22.3]"
    # tokens of random weights say nothing
    assert ("h100-llama-3.1-8b", "output throughput, tokens/s") not in shown.index
    found = pd.DataFrame(report.settings(seeds)).set_index("record")
    assert found.loc["cpu-smollm2-135m-instruct", ["pairs", "processes", "A/A pairs"]].tolist() == [20, 5, 8]
    assert found["stands for"].tolist() == ["itself", "50 tokens at 3 a cycle", "itself"]
    assert [row["mask's share of the time"] for row in report.table_published(published())] == ["2%", "20%"]
