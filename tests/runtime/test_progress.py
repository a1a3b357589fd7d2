"""The bar: nothing of it is left in a notebook, a log has lines, a terminal tqdm's own."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from eagle_lab.runtime.progress import LINES, progress

SOURCE = """
from eagle_lab.runtime.progress import progress
with progress(4, "pair", "pairs", done=1) as bar:
    for n in range(3):
        bar.update()
        bar.refresh()
"""


def test_in_a_notebook_it_is_one_output_that_ends_empty():
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    seen: list[str] = []

    class Client(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] in ("display_data", "update_display_data"):
                seen.append(msg["content"]["data"]["text/html"])
            return super().process_message(msg, cell, cell_index)

    Client(made, timeout=60, kernel_name="python3").execute()
    (output,) = made.cells[0].outputs
    assert output.output_type == "display_data" and output.data["text/html"] == ""
    assert seen[0].startswith('<progress value="1" max="4">') and "pairs: 1 of 4" in seen[0]
    assert any("pairs: 4 of 4" in text for text in seen)


def test_a_log_has_lines_on_stdout(monkeypatch, capsys):
    monkeypatch.setenv(LINES, "lines")
    with progress(2, "pair", "pairs") as bar:
        bar.update(2)
    told = capsys.readouterr()
    assert "pairs: 0 of 2" in told.out and "\n" in told.out and not told.err


@pytest.mark.parametrize("shown", [True, False])
def test_elsewhere_it_is_tqdm_on_stderr_or_nothing(monkeypatch, capsys, shown):
    monkeypatch.delenv(LINES, raising=False)
    with progress(2, "pair", "pairs", shown=shown) as bar:
        bar.update(2)
    told = capsys.readouterr()
    assert not told.out and ("2/2" in told.err) == shown
