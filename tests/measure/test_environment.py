from time import process_time

import torch

from eagle_lab.measure import environment
from eagle_lab.measure.environment import (
    LoadReading,
    fingerprint,
    foreign_load,
    machine_key,
    read_load,
    throttle_reasons,
)


def test_the_fingerprint_says_what_a_reader_needs():
    found = fingerprint("cpu")
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["name"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["gpu"] is None
    assert set(found) >= {"platform", "python", "commit", "dirty"}


def test_records_of_one_gpu_are_comparable_whatever_its_host():
    cpu = {"cpu": {"name": "A", "cores": 2}, "gpu": None}
    assert machine_key(cpu) != machine_key({"cpu": {"name": "A", "cores": 4}, "gpu": None})
    gpus = [{"cpu": {"name": name, "cores": 8}, "gpu": {"name": "NVIDIA H100"}} for name in "AB"]
    assert machine_key(gpus[0]) == machine_key(gpus[1])


def test_own_work_is_not_foreign_load():
    before, until = read_load(), process_time() + 0.3
    while process_time() < until:
        pass
    after = read_load()
    assert after.own - before.own > 0.25
    assert after.busy >= before.busy


def test_foreign_load_is_the_share_that_others_took(monkeypatch):
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 2)
    # 10 s on two cores: 12 s busy, of them 7 s own, so others had 5 of 20
    assert foreign_load(LoadReading(0, 100, 10), LoadReading(10, 112, 17)) == 0.25
    assert foreign_load(LoadReading(0, 100, 10), LoadReading(10, 110, 20)) == 0
    assert foreign_load(LoadReading(5, 0, 0), LoadReading(5, 1, 0)) == 0


def test_a_cpu_has_no_throttle_reasons():
    assert throttle_reasons(torch.device("cpu")) == []


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no git here
    assert environment._git()["commit"] is None
    monkeypatch.setenv("EAGLE_LAB_COMMIT", "abc123")
    assert environment._git() == {"commit": "abc123", "dirty": None}
