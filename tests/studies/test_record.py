"""All records of one machine, by one function."""

from __future__ import annotations

import pytest
from make import make_record

from eagle_lab.studies import record as records


def test_every_kind_is_made_in_turn_for_each_target(monkeypatch, tmp_path):
    made = []

    def maker(kind):
        return lambda *args, **options: made.append((kind, *args)) or make_record()

    monkeypatch.setattr(records, "load", lambda name, draft, device: name)
    for kind in ("machine_profile", "machine_ladder"):
        monkeypatch.setattr(records, kind, maker(kind))
    monkeypatch.setattr(records.seed, "redo", maker("redo"))
    monkeypatch.setattr(records.sweep, "record_machine", maker("sweep"))
    records.record("cpu", folder=tmp_path / "new")
    found = [(kind, first) for kind, first, *_ in made]
    each = [
        (kind, name)
        for kind in ("machine_profile", "machine_ladder", "redo")
        for name in (None, "shape:llama-3.2-1b", "shape:llama-3.1-8b")
    ]
    assert found == [*each, ("sweep", "cpu")] and list((tmp_path / "new").glob("*.json"))
    made.clear()
    records.each_target(maker("mine"), "cpu", "x/y", folder=tmp_path)
    records.each_target(maker("mine"), "cpu", "default", folder=tmp_path)
    assert made == [("mine", "x/y"), ("mine", None)]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file"):
        records.each_target(lambda pair: pytest.fail("measured"), "cpu", folder=tmp_path / "file" / "results")
