"""What every notebook keeps to, whoever wrote it; that it still gives its outputs is nbval's to check."""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from papermill import execute_notebook, inspect_notebook

from eagle_lab.measure.records import read
from eagle_lab.verdict.record import ComparisonRecord

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
UNCHECKED = {"nbval-ignore-output", "nbval-skip"}
PAGE = 118  # characters of code that a page of 1,100 pixels holds
# what a committed run must not show: nothing to judge, no end, a bar frozen on its way, a widget's name in place of a widget,
# a number that isn't there
UNFIT = re.compile(r"[Nn]o pair|[Tt]oo few|\[-inf|\d%\|[ #█▉▊▋▌▍▎▏]*\||\w+Box\(children|\bNaN\b")
PLOTLY = "application/vnd.plotly.v1+json"
LINE = re.compile(r"^(\w+): (int|float|str|bool|list)( = .+?)  # \S.*$")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def parameters(path: Path) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    return cell


def test_there_are_notebooks():
    assert {"compare", "explore"} <= {path.stem for path in NOTEBOOKS}


@each
def test_it_begins_with_its_question_and_how_long_it_takes(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert re.search(r"\b(seconds?|minutes?|hours?)\b", first.source), "does not say how long it takes"
    assert "?" in first.source, "does not say what it answers"
    told = nbformat.read(path, as_version=4).metadata["eagle_lab"]
    assert told["question"].endswith("?") and told["time"].removeprefix("about ") in first.source


@each
def test_every_parameter_is_typed_and_told(path):
    cell = parameters(path)
    assert code_cells(path)[0] is not None and code_cells(path)[0].source == cell.source, (
        "parameters come first"
    )
    bad = [line for line in cell.source.splitlines() if not LINE.match(line)]
    assert not bad, bad


@each
def test_papermill_tells_each_parameter_with_its_meaning(path):
    told = {name: " ".join(facts["help"].split()) for name, facts in inspect_notebook(str(path)).items()}
    lines = parameters(path).source.splitlines()
    meanings = {line.partition(":")[0]: " ".join(line.rpartition("  # ")[2].split()) for line in lines}
    assert told == meanings, "papermill's reader skips lines that it can't parse"


@each
def test_no_picture_is_wider_than_a_page(path):
    outputs = [one.get("data", {}) for cell in code_cells(path) for one in cell.outputs]
    pictures = [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]
    assert all(int.from_bytes(picture[16:20]) <= 930 for picture in pictures)  # JupyterLab cuts off the rest


@each
def test_unknown_parameters_are_refused_in_the_next_cell(path):
    assert "parameters.check(In, globals())" in code_cells(path)[1].source


@each
def test_its_cells_are_short_and_define_nothing(path):
    for cell in code_cells(path):
        if "parameters" in tags(cell):
            continue
        lines = [line for line in cell.source.splitlines() if line.strip()]
        plain = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
        tree = ast.parse(plain)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        working = len(lines) - sum(node.end_lineno - node.lineno + 1 for node in imports)
        assert working <= 8, f"{working} lines beside imports: {lines[0]}"
        kinds = {type(node) for node in ast.walk(tree)}
        # the reader's own strategy is what explore is for
        if path.stem != "explore":
            assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef}, lines[0]


@each
def test_nothing_is_captured_for_that_hangs_at_random(path):
    source = "\n".join(cell.source for cell in code_cells(path))
    assert not re.search(r"\binteract(ive)?\(", source) and not re.search(r"with \w*out\w*:", source)


@each
def test_it_is_committed_as_it_was_run(path):
    cells = code_cells(path)
    counts = [cell.execution_count for cell in cells if cell.source.strip()]
    assert None not in counts, "not executed"
    assert counts == sorted(counts), "executed out of order"
    errors = [output.evalue for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not errors, errors


@each
def test_something_in_it_is_checked(path):
    checked = [
        c for c in code_cells(path) if c.outputs and not tags(c) & UNCHECKED and "parameters" not in tags(c)
    ]
    assert checked, "every cell with an output is left out of the comparison"


@each
def test_a_still_picture_lies_beside_each_chart(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            data = output.get("data", {})
            if PLOTLY in data:
                assert "image/png" in data, cell.source
                assert data[PLOTLY]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)", (
                    f"not the kit's style: {cell.source}"
                )
                assert "sendChartToCloud" in data[PLOTLY]["layout"]["modebar"]["remove"]


@each
def test_axes_of_numbers_have_titles(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            layout = output.get("data", {}).get(PLOTLY, {}).get("layout", {})
            for name, axis in layout.items():
                if re.fullmatch(r"[xy]axis", name) and axis.get("visible", True):
                    assert (
                        axis.get("title", {}).get("text")
                        or axis.get("type") == "category"
                        or axis.get("ticktext")
                        or _named(output, name)
                    ), f"{name} has no title: {cell.source}"


def _named(output: nbformat.NotebookNode, axis: str) -> bool:
    """Whether an axis carries names, not numbers, which need no unit."""
    values = [v for trace in output["data"][PLOTLY]["data"] for v in trace.get(axis[0], []) or []]
    return bool(values) and all(isinstance(v, str) for v in values)


def unfit(output: nbformat.NotebookNode) -> str:
    """What of an output no reader should meet: a pink box, or words of `UNFIT`; "" for a calm one."""
    if output.output_type == "stream" and output.name == "stderr":
        return f"stderr: {output.text[:200]}"
    data = output.get("data", {})
    told = [output.get("text", ""), data.get("text/html", ""), data.get("text/markdown", "")]
    told += [] if len(data) > 1 else [data.get("text/plain", "")]
    told += [str(data[PLOTLY]["layout"].get("title", ""))] if PLOTLY in data else []
    found = UNFIT.search("\n".join(map(str, told)))
    return found[0] if found else ""


@each
def test_its_outputs_are_calm_and_say_something(path):
    found = [(cell.source, what) for cell in code_cells(path) for o in cell.outputs if (what := unfit(o))]
    assert not found, found


@pytest.mark.parametrize(
    "data",
    [
        {"text/markdown": "No pair is left to judge."}, {"text/markdown": "the whole changed by -60 ms [-inf, +inf]"},
        {"text/plain": "Loading weights:   0%|          | 0/272 [00:00<?, ?it/s]"},
        {"text/plain": "VBox(children=(HBox(children=("}, {"text/html": "5581 (too few for an interval)"},
    ],
)  # fmt: skip
def test_what_is_not_calm_is_refused(data):
    assert unfit(nbformat.v4.new_output("display_data", data))
    assert unfit(nbformat.v4.new_output("stream", name="stderr", text="x"))
    assert not unfit(
        nbformat.v4.new_output("display_data", {"text/markdown": "[0.9, 1.1], 6 pairs, 50% | 1"})
    )


@each
def test_no_line_of_code_is_wider_than_its_page(path):
    lines = [line for cell in code_cells(path) for line in cell.source.splitlines()]
    wide = [
        line for line in lines if len(line) > PAGE and not line.startswith("prompt: str")
    ]  # a text of its own
    assert not wide, wide


@each
def test_it_stays_small(path):
    assert path.stat().st_size < 1_500_000, f"{path.stat().st_size:,} bytes"


@each
def test_it_carries_nothing_of_one_run_or_one_machine(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"] and "papermill" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not {"papermill", "execution"} & set(cell["metadata"]), cell["id"]


@pytest.mark.slow
def test_the_comparison_of_an_arm_in_a_process_of_its_own(tmp_path):
    """Its pairs are whole decodes, which every cell must be able to show."""
    asked = {
        "device": "cpu", "candidate": f"doubling,python={sys.executable}", "prompts": "writing-01,maths-01", "iterations": 2,
        "forks": 1, "max_new_tokens": 8, "total_tokens": 7, "depth": 3, "top_k": 3, "results_dir": str(tmp_path),
    }  # fmt: skip
    notebook = NOTEBOOKS[0].parent / "compare.ipynb"
    execute_notebook(notebook, tmp_path / "out.ipynb", asked, progress_bar=False, kernel_name="python3")
    (record,) = (read(file, ComparisonRecord) for file in tmp_path.glob("comparison-*.json"))
    assert record.settings.outside and len(record.samples) == 2 and not record.instances
