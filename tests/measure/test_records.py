"""The record on disk: written in one step, grown line by line, read back whole or named as what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from make import make_record

from eagle_lab.measure import records
from eagle_lab.measure.records import RecordError, append, header, lines_beside, read, write, write_json
from eagle_lab.verdict.record import ComparisonRecord


def change(record, path, **fields):
    """Write a record with some of its JSON changed; None leaves a field out."""
    found = record.model_dump(mode="json") | fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    return path


def test_a_record_reads_back_as_it_was_written(tmp_path):
    record = make_record()
    write(record, tmp_path / "r.json")
    assert read(tmp_path / "r.json", ComparisonRecord) == record
    found = header(tmp_path / "r.json")
    assert (found.kind, found.created, found.environment) == (
        "comparison",
        record.created,
        record.environment,
    )


def test_numbers_stand_on_one_line_and_text_that_looks_like_them_stays(tmp_path):
    value = {"a": [[1.5e-07, -2, None], []], "b": ["[\n 1,\n 2\n]", "[1, 2]", 3], "c": [1], "d": [True]}
    write_json(value, tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert "[1.5e-07, -2, null]" in text and '"c": [1]' in text


def test_a_full_disk_leaves_the_old_record_whole_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write(make_record(), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(make_record(0.5), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_number_that_json_lacks_is_refused_rather_than_written_wrong(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.write_json({"x": float("nan")}, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def grown(tmp_path, count=5):
    """A record on disk that `count` samples were appended to, the whole of it, and its path."""
    whole, path = make_record(), tmp_path / "r.json"
    record = whole.model_copy(update={"samples": []})
    write(record, path)
    for sample in whole.samples[:count]:
        append(record, path, "samples", sample)
    return record, whole, path


def test_a_record_grows_by_a_line_and_is_read_whole(tmp_path):
    record, whole, path = grown(tmp_path)
    size = path.stat().st_size
    assert record.samples == whole.samples[:5] == read(path, ComparisonRecord).samples
    append(record, path, "samples", whole.samples[5])
    assert path.stat().st_size == size  # what was written is not written again
    assert read(path, ComparisonRecord).samples == whole.samples[:6]
    write(record, path)
    assert not lines_beside(path).exists() and read(path, ComparisonRecord) == record


def test_a_torn_line_is_the_only_one_that_a_crash_loses(tmp_path):
    record, whole, path = grown(tmp_path)
    lines = lines_beside(path)
    lines.write_bytes(lines.read_bytes()[:-40])
    assert read(path, ComparisonRecord).samples == whole.samples[:4]
    lines.write_text(lines.read_text().replace('"fork"', '"fork', 1))
    with pytest.raises(RecordError, match="r.jsonl is not JSON in line 1"):
        read(path, ComparisonRecord)


def test_lines_that_a_crash_left_beside_the_settled_record_do_not_count_twice(tmp_path):
    record, whole, path = grown(tmp_path)
    kept = lines_beside(path).read_bytes()
    write(record, path)
    lines_beside(path).write_bytes(
        kept
    )  # killed after the record was replaced, before its lines were removed
    assert read(path, ComparisonRecord).samples == whole.samples[:5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": "eagle_lab.compar', "ends in the middle"),
        ("", "is empty"),
        ("{1}", "is not JSON"),
        ("[1, 2]", "not a record"),
        ('{"a": 1}', "not a record"),
        ('{"schema": 1, "kind": "comparison"}', "before schemas had names"),
        (
            '{"schema": "eagle_lab.comparison.v99"}',
            "is a record of kind comparison in form v99; this version reads v2",
        ),
    ],
)
def test_truncated_and_foreign_files_are_named(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=words) as caught:
        read(path, ComparisonRecord)
    assert "bad.json" in str(caught.value)


def test_reading_a_folder_skips_and_names_what_is_broken(tmp_path):
    write(make_record(), tmp_path / "good.json")
    (tmp_path / "bad.json").write_text("{")
    found, skipped = records.read_all(tmp_path, ComparisonRecord)
    assert [path.name for path in found] == ["good.json"]
    assert len(skipped) == 1 and "bad.json" in skipped[0]


def test_a_missing_file_and_a_folder_that_cannot_be_made_are_one_sentence(tmp_path):
    with pytest.raises(RecordError, match="is not there"):
        read(tmp_path / "none.json", ComparisonRecord)
    with pytest.raises(RecordError, match="is a folder"):
        read(tmp_path, ComparisonRecord)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        records.check_folder(tmp_path / "file" / "results")


def test_the_command_line_tells_no_folders(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/someone/bin/tool", "/home/someone/x.json", "-p"])
    assert records.command_line() == records.made()["command"] == "tool x.json -p"
    monkeypatch.setattr("sys.argv", [str(Path(records.__file__).with_name("__main__.py"))])
    assert records.command_line() == "python -m eagle_lab"
    monkeypatch.setattr("sys.argv", ["tool", "start=data/head", "draft=/home/someone/head", "results/draft"])
    assert records.command_line() == "tool start=data/head draft=head results/draft"
    words = ["draft=/home/someone/a,code=../someone/b,top_k=4", "~someone/c", "url=http://127.0.0.1:8000/v1"]
    monkeypatch.setattr("sys.argv", ["tool", *words])
    assert records.command_line() == "tool draft=a,code=b,top_k=4 c url=http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"settings": None}, "settings is missing"),
        ({"settings": {}}, "settings.target is missing"),
        ({"settings": {**make_record().settings.model_dump(), "delta": 5}}, "settings.delta is 5; it must be below"),
        ({"settings": {**make_record().settings.model_dump(), "looks": [20, 10]}}, ".*rising"),
        ({"samples": {}}, "samples is {}; it must be a list"),
        ({"samples": ["text"]}, "samples.0 is 'text'; "),
        ({"samples": [{"fork": 0}]}, "samples.0.iteration is missing"),
        *(
            ({"samples": [{**make_record().samples[0].model_dump(), "candidate_s": seconds}]}, "samples.0.candidate_s is ")
            for seconds in (0, -1.0, None, "soon")
        ),
        ({"parts": [{"fork": 0}]}, "parts.0.arm is missing"),
        ({"events": [{"event": "fire"}]}, "events.0"),
        ({"correctness": {}}, "correctness.random_trees is missing"),
        ({"environment": []}, "environment is [[]]; "),
        ({"more": 1}, "more is 1; extra"),
    ],
)  # fmt: skip
def test_a_comparison_that_is_not_whole_says_what_is_wrong(tmp_path, fields, words):
    path = change(make_record(), tmp_path / "comparison.json", **fields)
    with pytest.raises(RecordError, match=f"no whole comparison record: {words}"):
        read(path, ComparisonRecord)


def test_the_umask_decides_who_may_read_a_record(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            write_json({"schema": "x"}, tmp_path / "record.json")
        finally:
            os.umask(before)
        assert (tmp_path / "record.json").stat().st_mode & 0o777 == mode
        assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
