"""All records of one machine, by one function."""

from __future__ import annotations

import pytest

from eagle_lab.studies import record as records


def test_every_kind_is_made_in_turn_and_an_unknown_one_is_refused_before_any(monkeypatch, tmp_path):
    made = []

    def maker(kind):
        return lambda device, target, folder: made.append((kind, device, target, folder))

    monkeypatch.setattr(records, "KINDS", {kind: maker(kind) for kind in records.KINDS})
    with pytest.raises(
        ValueError, match="what is 'profil'; it must be 'profile', 'ladder', 'seed' or 'sweep'"
    ):
        records.record("cpu", "default", ["ladder", "profil"], tmp_path)
    assert not made
    records.record("cpu", "default", folder=tmp_path / "new")
    assert made == [
        (kind, "cpu", "default", tmp_path / "new") for kind in ("profile", "ladder", "seed", "sweep")
    ]
    assert (tmp_path / "new").is_dir()


def test_a_command_names_its_targets():
    assert records.targets("all") == ("", "shape:llama-3.1-8b")
    assert records.targets("default") == ("",) and records.targets("x/y") == ("x/y",)
