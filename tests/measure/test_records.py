import errno
import json
import os
from pathlib import Path

import pytest
from make import make_record

from eagle_lab.measure import old_records as records
from eagle_lab.measure.environment import Gpu, fingerprint
from eagle_lab.measure.old_records import RecordError
from eagle_lab.measure.records import machine_slug


def test_a_record_reads_back_as_it_was_written(tmp_path):
    record = records.new("comparison", {"seed": 3})
    records.write(record, tmp_path / "r.json")
    assert records.read(tmp_path / "r.json") == record
    assert record["environment"]["versions"]["torch"]


def test_a_full_disk_leaves_the_old_record_whole_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    records.write(records.new("comparison", {"n": 1}), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        records.write(records.new("comparison", {"n": 2}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_number_that_json_lacks_is_refused_rather_than_written_wrong(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.write({"x": float("nan")}, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 1, "kind": "compar', "not readable JSON"),
        ("[1, 2]", "not a record"),
        ('{"a": 1}', "not a record"),
        ('{"schema": 99, "kind": "comparison"}', "schema 99"),
    ],
)
def test_truncated_and_foreign_files_are_named(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=words) as caught:
        records.read(path)
    assert "bad.json" in str(caught.value)


def test_reading_a_folder_skips_and_names_what_is_broken(tmp_path):
    records.write(records.new("profile", {}), tmp_path / "good.json")
    (tmp_path / "bad.json").write_text("{")
    found, skipped = records.read_all(tmp_path)
    assert [path.name for path in found] == ["good.json"]
    assert len(skipped) == 1 and "bad.json" in skipped[0]


def test_a_missing_file_and_a_folder_that_cannot_be_made_are_one_sentence(tmp_path):
    with pytest.raises(RecordError, match="is not there"):
        records.read(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        records.check_folder(tmp_path / "file" / "results")


def test_the_command_line_tells_no_folders(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/someone/bin/tool", "/home/someone/x.json", "-p"])
    assert records.command_line() == "tool x.json -p"
    for name, words in (("sweep", "python -m eagle_lab.studies.sweep"), ("__main__", "python -m eagle_lab")):
        monkeypatch.setattr("sys.argv", [str(Path(records.__file__).with_name(f"{name}.py"))])
        assert records.command_line() == words
    monkeypatch.setattr("sys.argv", ["/home/someone/bin/tool", "/home/someone/x.json", "-p"])
    assert json.dumps(records.new("k", {})).count("/home/someone") == 0


def test_pairs_of_another_machine_or_other_software_do_not_belong_together():
    here = records.fingerprint("cpu")
    assert records.moved(here, here) == []
    there = {**here, "cpu": {**here["cpu"], "cores": 999, "torch_threads": 77}}
    told = "; ".join(records.moved(there, here))
    assert "999 cores, and this is" in told and "77 threads" in told
    older = {**here, "versions": {**here["versions"], "torch": "1.0"}}
    assert records.moved(older, here) == [f"torch 1.0, and here is {here['versions']['torch']}"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": None}, "it has no settings"),
        ({"settings": {}}, "its settings lack target, draft"),
        ({"samples": {}}, "it has no samples"),
        ({"samples": ["text"]}, r"its samples\[0\] is a str"),
        ({"samples": [{"fork": 0}]}, r"its samples\[0\] lack iteration"),
        ({"parts": [{"fork": 0}]}, r"its parts\[0\] lack arm"),
        ({"events": [1]}, r"its events\[0\] is a int"),
        ({"correctness": {}}, "its correctness lack random_trees"),
        ({"environment": []}, "its environment is a list"),
        ({"kind": "profile"}, "only a comparison has a verdict"),
    ],
)
def test_a_comparison_that_is_not_whole_says_what_is_wrong(tmp_path, change, words):
    path = tmp_path / "comparison.json"
    records.write({**make_record(), **change}, path)
    with pytest.raises(records.RecordError, match=words):
        records.read_comparison(path)


@pytest.mark.parametrize("seconds", [0, -1.0, None, "1"])
def test_a_comparison_with_times_that_are_none_is_refused(tmp_path, seconds):
    record = make_record()
    record["samples"][3]["candidate_s"] = seconds
    records.write(record, tmp_path / "comparison.json")
    with pytest.raises(records.RecordError, match="isn't a positive number"):
        records.read_comparison(tmp_path / "comparison.json")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_machine_slugs(name, slug):
    gpu = Gpu(name=name, memory_bytes=1, multiprocessors=1, cuda=None)
    assert machine_slug(fingerprint().model_copy(update={"gpu": gpu})) == slug
    assert machine_slug(fingerprint()) == "cpu"
