"""Charts: one look, what they draw, and that a tree's picture says what the cycle did."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess

import plotly.graph_objects as go
import pytest
import torch
from make import byte_tokenizer, control, make_instances, make_record

from eagle_lab.decode.generate import Cycle
from eagle_lab.decode.masks import rebuild
from eagle_lab.measure import records
from eagle_lab.measure.environment import Cause
from eagle_lab.report.charts import comparison
from eagle_lab.report.charts import ladder as charts_ladder
from eagle_lab.report.charts import profile as charts_profile
from eagle_lab.report.charts import style as charts
from eagle_lab.report.charts import tree as charts_tree
from eagle_lab.studies.record import OptimizeRecord
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.summary import verdict_of


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def record(pairs: int = 12, shift: float = 1.05, aside: int = 3) -> ComparisonRecord:
    """A comparison in forks of four pairs, the third of them dropped, and a control of `aside` pairs."""
    found = make_record(shift, forks=1, per_fork=pairs)
    found.samples = [
        s.model_copy(update={"fork": n // 4, "dropped": (Cause.FOREIGN_LOAD,) if n == 2 else ()})
        for n, s in enumerate(found.samples)
    ]
    found.samples += control(found, aside)
    return found


@pytest.fixture
def cycle() -> Cycle:
    """Nodes 1 and 2 below the root, 3 and 4 below 1, 5 below 4; the path 0, 1, 4 was accepted."""
    parents = (-1, 0, 0, 1, 1, 4)
    scores = (-0.1, -2.0, -3.0, -0.4, -5.0)
    return Cycle(10, (50, 51, 54), 99, (50, 51, 52, 53, 54, 55), parents, (0, 1, 1, 2, 2, 3), scores)


def test_a_strategy_has_one_colour_whatever_it_is_called_by():
    assert charts.colour("doubling") == charts.colour("mask=doubling")
    assert charts.colour("somebody's own") == charts.colour("somebody's own")
    assert charts.colour("somebody's own") in charts.PALETTE
    shown = [
        charts.colour(name) for name in ("rebuild", "incremental", "incremental_inplace", "doubling", "mine")
    ]
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("ground", ["#ffffff", "#111111"])
def test_text_and_colours_read_in_light_and_dark(ground):
    assert contrast(charts.INK, ground) > 4.1
    # marks need less than text; orange and sky are the palest on white
    assert all(contrast(paint, ground) > 2 for paint in charts.PALETTE)


def test_style_leaves_the_ground_clear_and_sends_nothing_to_a_server():
    figure = charts.style(go.Figure(go.Scatter(x=[1], y=[2])), 300)
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert "sendChartToCloud" in figure.layout.modebar.remove
    assert figure.layout.height == 300
    assert len(figure.to_json()) < 3000


def test_paired_latencies_joins_the_arms_of_each_pair_and_draws_both_medians():
    figure = comparison.paired_latencies(record())
    joints, low, base, high, cand = figure.data
    assert list(joints.y[:2]) == [base.y[0], cand.y[0]] and joints.y[2] is None
    assert len(base.y) == len(cand.y) == 12  # no control among them
    assert (base.marker.color, cand.marker.color) == (charts.colour("rebuild"), charts.colour("other"))
    assert base.marker.symbol[2] == "x-thin-open" and base.marker.symbol[0] == "circle"
    for middle in (low, high):
        assert middle.error_y.visible and middle.error_y.array[0] > 0
    assert "(ms)" in figure.layout.yaxis.title.text


def test_ratio_figure_draws_the_interval_delta_and_the_control():
    figure = comparison.ratio_figure(record())
    pairs, control = figure.data
    assert len(pairs.y) == 12 and len(control.y) == 3 and control.x[0] == 13
    assert all(y > 1.04 for y in pairs.y) and all(y < 1.01 for y in control.y)
    spans = [(shape.y0, shape.y1) for shape in figure.layout.shapes if shape.type == "rect"]
    assert (1 / 1.01, 1.01) in spans and any(1.04 < low < high < 1.06 for low, high in spans)
    assert figure.layout.title.text.startswith(("REVERT", "INCONCLUSIVE"))


def test_cycles_are_drawn_in_the_order_taken_with_the_estimate_so_far_and_the_control_beside():
    found = make_instances(1.05)
    found.instances[2] = found.instances[2].model_copy(update={"dropped": (Cause.POWER_CAP,)})
    aside, dots, way, low, high = comparison.ratio_figure(found).data
    assert len(dots.y) == len(aside.y) == 15 and dots.marker.symbol[2] == "x-thin-open"
    assert all(1.03 < y < 1.07 for y in dots.y) and all(0.98 < y < 1.02 for y in aside.y)
    assert all(0 < a - b < 1 for a, b in zip(aside.x, dots.x, strict=True))
    assert len(way.y) == 14 and way.y[-1] == pytest.approx(verdict_of(found).estimate, abs=1e-4)
    assert (low.y[-1], high.y[-1]) == pytest.approx((verdict_of(found).low, verdict_of(found).high), abs=1e-4)
    assert low.y[0] is None  # one instance has no interval
    assert len(comparison.paired_latencies(found).data[2].y) == 15


def test_cycles_are_drawn_by_process_and_by_prompt():
    processes, aside, means, *prompts = comparison.groups_figure(make_instances(1.05)).data
    assert len(processes.y) == len(aside.y) == 15 and len(means.y) == 5 and len(prompts[2].y) == 3


def test_pairs_of_decodes_are_drawn_by_process_and_by_prompt():
    found = record()
    processes, aside, means, *_ = comparison.groups_figure(found).data
    assert len(processes.y) == 11 and len(aside.y) == 2 and len(means.y) == 3, "one of each was dropped"
    first = found.samples[0]
    assert processes.y[0] == pytest.approx(first.candidate_s / first.baseline_s, abs=1e-5)
    found.samples = [s.model_copy(update={"candidate_tokens": 2 * s.new_tokens}) for s in found.samples]
    found.settings = found.settings.model_copy(update={"rule": "time per token"})
    assert comparison.groups_figure(found).data[0].y[0] == pytest.approx(processes.y[0] / 2, abs=1e-5)
    assert comparison.ratio_figure(found).data[0].y[0] == pytest.approx(processes.y[0] / 2, abs=1e-5)
    found.samples = []
    assert not any(trace.y for trace in comparison.groups_figure(found).data)


def test_ratio_figure_says_that_there_is_no_interval_or_no_pair():
    few = comparison.ratio_figure(record(pairs=2, aside=0))
    assert "too few pairs for an interval" in few.layout.title.text
    assert len([s for s in few.layout.shapes if s.type == "rect"]) == 1  # delta's alone
    none = record(pairs=2, aside=0)
    none.samples = [s.model_copy(update={"dropped": (Cause.POWER_CAP,)}) for s in none.samples]
    assert "no pair is left" in comparison.ratio_figure(none).layout.title.text


@pytest.mark.parametrize(
    "kind", ["cpu-smollm2-135m-instruct", "h100-llama-3.2-1b", "h100-smollm2-135m-instruct"]
)
def test_a_ladders_axis_has_two_ticks_or_more(kind):
    found = records.committed(OptimizeRecord)[kind].ladder
    axis = charts_ladder.ladder(found).layout.xaxis
    low, high = (10**end for end in axis.range)
    assert sum(low <= tick <= high for tick in axis.tickvals) >= 2


def test_the_tree_marks_the_accepted_path_and_greys_the_rest(cycle):
    assert charts_tree.accepted_path(cycle) == [0, 1, 4]
    nodes = next(t for t in charts_tree.tree_figure(cycle).data if t.name == "nodes")
    paint = nodes.marker.color
    assert [paint[i] for i in (0, 1, 4)] == [charts.BONUS, charts.depth_colour(1), charts.depth_colour(2)]
    assert len({paint[i] for i in (2, 3, 5)}) == 1
    sizes = nodes.marker.size
    assert sizes[0] > sizes[1] > sizes[4] > sizes[2] > sizes[3] > sizes[5]  # by probability
    assert "accepted" in nodes.customdata[4] and "rejected" in nodes.customdata[5]
    assert "2 of 5 drafted tokens accepted" in charts_tree.tree_figure(cycle).layout.title.text


def test_the_heatmap_is_the_mask_with_the_accepted_rows_marked(cycle):
    z = torch.tensor(charts_tree.mask_heatmap(cycle).data[0].z)
    assert torch.equal(z.bool(), rebuild(torch.tensor(cycle.parents[1:])))
    assert [int(row.max()) for row in z] == [2, 2, 1, 1, 2, 1]


def test_every_leaf_has_a_row_of_its_own_and_a_parent_stands_amid_its_children():
    for links in itertools.product(*(range(i + 1) for i in range(6))):
        parents = (-1, *links)
        rows = charts_tree.places(parents)
        leaves = [i for i in range(len(parents)) if i not in parents]
        assert sorted(rows[i] for i in leaves) == list(range(len(leaves)))
        for node in set(links):
            below = [rows[i] for i, p in enumerate(parents) if p == node]
            assert min(below) <= rows[node] <= max(below)


def test_a_63_node_cycle_fits_a_committed_notebook():
    generator = random.Random(0)
    parents = (-1, *(generator.randrange(i + 1) for i in range(63)))
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    big = Cycle(5, (0,), 9, tuple(range(64)), parents, tuple(depths), tuple(-0.1 * i for i in range(63)))
    figure = charts_tree.cycle_figure(big)
    assert len(figure.to_json()) < 40_000
    assert figure.layout.meta["parents"] == list(parents)
    assert all(len(figure.layout.meta[name]) == 64 for name in ("labels", "room"))


def random_cycle(nodes, seed):
    """A cycle of so many draft nodes that accepted a path down to a leaf."""
    generator = random.Random(seed)
    parents, depths = [-1], [0]
    for node in range(nodes):
        parents.append(generator.randrange(max(0, node - 20), node + 1))
        depths.append(depths[parents[-1]] + 1)
    path = [nodes]
    while path[0]:
        path.insert(0, parents[path[0]])
    scores = tuple(-generator.random() * depth for depth in depths[1:])
    return Cycle(5, tuple(path), 9, tuple(range(nodes + 1)), tuple(parents), tuple(depths), scores)


@pytest.mark.parametrize("nodes", [1, 2, 7, 24, 63, 128, 255])
def test_a_tree_of_any_size_fits_a_screen_its_labels_apart_its_mask_square_with_whole_ticks(nodes):
    cycle = random_cycle(nodes, nodes)
    figure = charts_tree.cycle_figure(cycle)
    assert 340 <= figure.layout.height <= 600
    rows, path = charts_tree.rows_of(cycle), charts_tree.accepted_path(cycle)
    pixels = charts_tree.row_height(rows)
    text = next(t for t in figure.data if t.name == "nodes").text
    labelled = [i for i in range(nodes + 1) if text[i]]
    assert set(path) <= set(labelled)
    for one, other in itertools.combinations(labelled, 2):
        if cycle.depths[one] == cycle.depths[other] and not {one, other} <= set(path):
            assert abs(rows[one] - rows[other]) * pixels >= charts_tree.LINE
    assert figure.layout.yaxis2.scaleanchor == "x2"
    for axis in (figure.layout.xaxis2, figure.layout.yaxis2, figure.layout.xaxis):
        assert axis.dtick == int(axis.dtick) >= 1
    assert nodes / figure.layout.xaxis2.dtick <= 8
    inner = [i for i in range(nodes + 1) if i in cycle.parents]
    assert all(0 < figure.layout.meta["room"][i] <= 0.85 for i in inner)


def test_a_token_that_is_no_text_is_told_by_its_bytes():
    tokenizer = byte_tokenizer()
    eagle, space = tokenizer.encode("🦅"), tokenizer.encode(" ")
    assert [charts_tree.token_text(tokenizer, i) for i in eagle] == ["<F0>", "<9F>", "<A6>", "<85>"]
    assert charts_tree.token_text(tokenizer, space[0]) == "·"

    class Fallback:
        def decode(self, ids):
            return "\ufffd"

        def convert_ids_to_tokens(self, token):
            return f"<0x{token:02X}>"

    assert charts_tree.token_text(Fallback(), 0xF0) == "<F0>"
    assert charts_tree.token_text(None, 7) == "#7"


def test_the_failure_is_drawn_with_its_wrong_entries_red():
    parents = [0, 1, 2]
    expected = rebuild(torch.tensor(parents))
    actual = expected.clone()
    actual[3, 1] = False
    figure = charts_tree.failure_figure(parents, expected, actual, "mine")
    assert [list(row).index(2) for row in figure.data[-1].z if 2 in row] == [1]


def test_stage_bars_put_the_longest_on_top_and_draw_ranges():
    figure = charts_profile.stage_bars({"draft": (0.08, 0.1, 0.2), "target": 0.3, "tree_mask": 0.0004})
    (bar,) = figure.data
    assert list(bar.x) == [0.4, 100.0, 300.0]
    assert bar.error_x.visible and list(bar.error_x.array) == [0.0, 100.0, 0.0]
    assert not charts_profile.stage_bars({"draft": 0.1}).data[0].error_x.visible


def test_the_link_is_told_its_mark_and_colour_and_is_a_script():
    html = charts_tree.link_script("eagle-link-7")
    assert html.startswith('<span id="eagle-link-7"></span><script>(')
    assert html.rstrip().endswith(f')("eagle-link-7", "{charts.RED}");</script>')
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine to parse the script with")
    script = html.partition("<script>")[2].removesuffix("</script>")
    done = subprocess.run([node, "--check", "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_picture_needs_a_browser_and_says_so_by_none(monkeypatch):
    figure = charts.style(go.Figure())
    monkeypatch.setattr(charts, "has_browser", lambda: False)
    assert charts.picture(figure) is None
