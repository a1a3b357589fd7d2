"""The proof's words and chart."""

from __future__ import annotations

from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.acceptance import Depth
from eagle_lab.measure.records import Difference
from eagle_lab.report import correctness as report
from eagle_lab.report.charts.head import acceptance_figure
from eagle_lab.studies.correctness import (
    Accepted,
    CyclesCheck,
    DecodingCheck,
    DistributionCheck,
    MaskCheck,
    Outcome,
)

TIE = Difference(position=3, left=ord("*"), right=ord("b"), margin=0.0625, tolerance=1.03)
ENDED = Difference(position=7, left=None, right=ord(" "), margin=None, tolerance=None)
CHECKS = [
    MaskCheck("walk", Outcome.PASSED, 1),
    MaskCheck("cuda", Outcome.SKIPPED, fault="mask=cuda needs a CUDA GPU, but the device is cpu"),
    MaskCheck("mine", Outcome.FAILED, 7, "Row 2 differs, <b>."),
    DecodingCheck(Decoding.of(8), Outcome.PASSED, 2, 16, ()),
    DecodingCheck(
        Decoding.of(8, "walk", temperature=0.5, seed=0), Outcome.PASSED, 1, 8, (("one", TIE), ("two", TIE))
    ),
    DecodingCheck(Decoding.of(8), Outcome.FAILED, 1, 8, (("one", ENDED),)),
    DistributionCheck(200_000, True, ((None, 0.037), (ord("é"), 0.72))),
    DistributionCheck(1000, False, ((None, 1e-7),)),
    CyclesCheck(50),
    CyclesCheck(50, ("gap", 99)),
    CyclesCheck(50, ("path", 99)),
]


class Letters:
    """A tokenizer whose tokens are the letters by their numbers."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_each_check_says_what_was_found(snapshot):
    snapshot(report.paragraphs(CHECKS, Letters()) + "\n\n" + report.summary(CHECKS[:2]), "correctness.md")
    snapshot(report.html(CHECKS[:3]), "correctness.html")
    assert "“é” (233)" in report.words(CHECKS[6], Letters()) and "after 233;" in report.words(CHECKS[6])
    assert [row["outcome"] for row in report.outcomes(CHECKS[:3])] == ["passed", "skipped", "FAILED"]


def test_acceptance_in_a_table_and_a_chart():
    rows = [Accepted("maths", 2.0, 8), Accepted("code", 3.4, 5), Accepted(None, 2.54, 13)]
    assert [row["prompts"] for row in report.acceptance(rows)] == ["maths", "code", "all"]
    depths = [
        Depth(depth=1, reached=13, accepted=0.8),
        Depth(depth=2, reached=9, accepted=0.5),
        Depth(depth=3, reached=0, accepted=0.0),
    ]
    figure = acceptance_figure(rows, depths)
    assert list(figure.data[0].y) == ["maths", "all", "code"] and list(figure.data[1].x) == [1, 2]
