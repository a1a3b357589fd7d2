"""A sweep's tables, words and charts."""

from __future__ import annotations

import pytest
from make import LAWS, SWEPT, make_instances, make_record, make_sweep

from eagle_lab.report import sweep as report
from eagle_lab.report.charts import sweep as charts
from eagle_lab.studies.sweep import Cell, Missing


@pytest.fixture
def on_a_gpu():
    graph = {("flat", 63): 5, ("flat", 511): 11, ("walk", 63): 6}
    return make_sweep(LAWS, device="cuda", gaps=[("flat", 127)], graph_us=graph, graph_call_s=2e-6)


def decoded(baseline="rebuild", candidate="walk", **changes):
    return make_record(0.99, call=(1e-3, 5e-4), baseline=baseline, candidate=candidate, **changes)


def test_tables_have_plain_numbers_and_mark_what_is_missing(on_a_gpu):
    times, inside = report.times(on_a_gpu), report.times(on_a_gpu, "graph_s")
    assert list(times.columns) == SWEPT and times.index[-1] == "floor"
    assert times.loc["flat", 127] == report.NONE and times.loc["rebuild", 1023] == "3,058"
    assert inside.loc["flat", 63] == "5.00" and inside.loc["rebuild", 63] == report.NONE
    assert report.times(on_a_gpu, "host_s").loc["floor", 63] == report.NONE
    assert report.speedups(on_a_gpu).loc["walk", 63] == "2.99 [2.96,\N{NO-BREAK SPACE}3.02]"
    assert report.memory(on_a_gpu).loc["walk", 63] == "1.00"


def test_growth_and_crossovers_stand_in_one_table(on_a_gpu):
    found = report.scaling(on_a_gpu)
    assert found.loc["walk"].iloc[-1] == "every size" and found.loc["never"].iloc[-1] == "no size"
    assert found.loc["flat"].iloc[-1].startswith("100 [") and found.loc["rebuild"].iloc[-1] == report.NONE
    assert found.loc["same"].iloc[-1].endswith("above 1023]")
    assert found.loc["rebuild"].iloc[0].startswith("1.00 [") and found.loc["flat"].iloc[1] == report.NONE
    assert found.shape[1] == 3 and report.scaling(make_sweep(LAWS)).shape[1] == 2


def test_a_sweeps_page(on_a_gpu, snapshot):
    on_a_gpu.cells.append(Cell(builder="flat", size=63, batch=32, graph_missing=Missing(reason="host_loop")))
    on_a_gpu.cells.append(Cell(builder="never", size=63, batch=32, missing=Missing(reason="wrong")))
    on_a_gpu.cells.append(Cell(builder="same", size=63, batch=32, missing=Missing(reason="interpreted")))
    text = "\n".join(
        [
            report.head(on_a_gpu),
            report.page(on_a_gpu),
            report.gaps(on_a_gpu),
            report.family(["rebuild", "cuda"], "cpu"),
        ]
    )
    snapshot(text, "sweep.md")


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("mask_alone", decoded()),
        ("no_pair", decoded().model_copy(update={"samples": []})),
        ("no_time_alone", decoded("attention=tree", "doubling,attention=tree")),
        ("more_than_the_mask", decoded("rebuild", "walk,attention=tree")),
    ],
)
def test_whole_decodes_hold_the_gain_alone_only_where_the_mask_alone_differs(name, compared, snapshot):
    record = make_sweep(LAWS)
    record.end_to_end = compared
    snapshot(report.whole(record), f"sweep_whole_{name}.md")


def test_the_times_leave_out_what_is_not_there(on_a_gpu):
    figure = charts.times(on_a_gpu)
    flat = next(trace for trace in figure.data if trace.name == "flat")
    assert list(flat.x) == [s for s in SWEPT if s != 127] and figure.data[-1].name == "floor"
    assert [trace.name for trace in charts.times(on_a_gpu, "graph_s").data] == ["flat", "walk", "floor"]
    theirs = charts.times(on_a_gpu, builders=["rebuild"], published={"rebuild": (63, 0.0002)}).data[1]
    assert theirs.name == "rebuild, as published" and (theirs.x[0], theirs.y[0]) == (63, 200)


def test_the_gains_have_no_row_for_a_mask_where_more_differs():
    record = make_sweep(LAWS)
    assert not charts.gains(record).data
    record.end_to_end = decoded()
    drawn = charts.gains(record).data[0]
    assert list(drawn.y) == ["whole decodes", "mask alone"] and drawn.x[1] == pytest.approx(1 / 3, rel=0.03)
    record.end_to_end = make_instances(candidate="walk")
    assert list(charts.gains(record).data[0].y) == ["cycles in turn", "mask alone"]
    record.end_to_end = decoded("cache=concat", "walk,attention=tree")
    figure = charts.gains(record)
    assert list(figure.data[0].y) == ["whole decodes"] and figure.data[0].name == "walk,attention=tree"
    assert figure.layout.xaxis.title.text == "time over cache=concat's, 63 nodes (below 1 is faster)"
    record.end_to_end = decoded("cache=concat", "walk,attention=tree", forks=1, per_fork=2)
    assert not charts.gains(record).data
