"""The fingerprint of a machine: names, what this process may use of it, and what makes two records comparable."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from make import ENVIRONMENT, needs_gpu

from eagle_lab.engines.revision import code_of
from eagle_lab.measure import environment
from eagle_lab.measure.environment import Environment, fingerprint, machine_key, moved, throttle_reasons


def with_cpu(**cpu):
    return Environment.model_validate({**ENVIRONMENT, "cpu": {**ENVIRONMENT["cpu"], **cpu}})


def test_the_fingerprint_says_what_a_reader_needs():
    found = fingerprint("cpu")
    assert found.cpu.cores >= found.cpu.affinity >= found.cpu.usable > 0 and found.cpu.name
    # a distribution's metadata may leave out which build it is, such as +cu130
    assert found.versions["torch"] == metadata.version("torch")
    assert torch.__version__.startswith(found.versions["torch"])
    assert found.gpu is None and found.platform and found.python


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_on_one_core_is_another_machine():
    every = os.sched_getaffinity(0)
    whole = fingerprint()
    os.sched_setaffinity(0, {min(every)})
    try:
        one = fingerprint()
    finally:
        os.sched_setaffinity(0, every)
    assert (one.cpu.affinity, one.cpu.usable) == (1, 1)
    assert machine_key(one).endswith(", 1 core")
    if len(every) > 1:
        assert machine_key(one) != machine_key(whole) and "1 core" in moved(whole, one)[0]


def test_records_from_before_the_process_was_asked_still_have_a_machine():
    old = Environment.model_validate(ENVIRONMENT)
    assert old.cpu.usable is None and machine_key(old) == "A CPU, 2 cores"
    assert machine_key(with_cpu(usable=1.5)) == "A CPU, 1.5 cores"


def test_records_of_one_gpu_are_comparable_whatever_its_host():
    assert machine_key(with_cpu(cores=2)) != machine_key(with_cpu(cores=4))
    gpu = {"name": "NVIDIA H100", "memory_bytes": 1, "multiprocessors": 1, "cuda": "13"}
    hosts = [with_cpu(name=name).model_copy(update={"gpu": environment.Gpu(**gpu)}) for name in "AB"]
    assert machine_key(hosts[0]) == machine_key(hosts[1]) == "NVIDIA H100"


def test_pairs_of_another_machine_or_other_software_do_not_belong_together():
    here = fingerprint("cpu")
    assert moved(here, here) == []
    cpu = here.cpu.model_copy(update={"usable": 999.0, "torch_threads": 77})
    told = "; ".join(moved(here.model_copy(update={"cpu": cpu}), here))
    assert "999 cores, and this is" in told and "77 threads" in told
    older = here.model_copy(update={"versions": {**here.versions, "torch": "1.0"}})
    assert moved(older, here) == [f"torch 1.0, and here is {here.versions['torch']}"]


ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
LSCPU = "Architecture: aarch64\nVendor ID:               ARM\n  Model name:            Neoverse-N1\n"


@pytest.mark.parametrize(
    ("cpuinfo", "commands", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9654\nprocessor\t: 1\nmodel name\t: AMD EPYC 9654\n", {}, "AMD EPYC 9654"),
        (ARM, {"lscpu": LSCPU}, "ARM Neoverse-N1"),
        ("", {"sysctl": "Apple M3 Pro"}, "Apple M3 Pro"),
        (ARM, {"lscpu": "Vendor ID: 0x61\nModel name: -\n"}, "aarch64 0x41 0xd0c"),
        (ARM, {}, "aarch64 0x41 0xd0c"),
    ],
)  # fmt: skip
def test_processors_have_names_on_x86_arm_and_apple(monkeypatch, cpuinfo, commands, name):
    monkeypatch.setattr(environment, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(environment, "_output", lambda *command: commands.get(command[0]))
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    assert environment._cpu_name() == name


@needs_gpu
def test_a_gpu_is_told_by_its_uuid_and_by_how_many_are_visible():
    code = "from eagle_lab.measure.environment import fingerprint as f; g = f('cuda').gpu; print(g.visible, g.uuid)"
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    seen = {**os.environ, "CUDA_VISIBLE_DEVICES": first}
    done = subprocess.run([sys.executable, "-c", code], env=seen, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", fingerprint("cuda").gpu.uuid]


def test_a_cpu_has_no_throttle_reasons():
    assert throttle_reasons(torch.device("cpu")) == []


def test_a_record_and_an_arm_call_the_same_files_changes(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True
        )

    def dirty():
        assert environment._git()["dirty"] == code_of(str(tmp_path), tmp_path).dirty
        return environment._git()["dirty"]

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv("EAGLE_LAB_COMMIT", raising=False)
    assert environment._git() == {"commit": None, "dirty": None}
    for name in ("eagle_lab", "notebooks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.py").write_text("x = 1")
    git("init", "-q")
    git("config", "status.showUntrackedFiles", "no")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert dirty() is False
    (tmp_path / "notebooks" / "old.py").write_text("x = 2")
    (tmp_path / "mine.py").write_text("x = 1")
    assert dirty() is False
    new = tmp_path / "eagle_lab" / "new.py"
    new.write_text("x = 1")
    assert dirty() is True
    new.unlink()
    (tmp_path / "eagle_lab" / "old.py").write_text("x = 2")
    assert dirty() is True


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no git here
    assert environment._git()["commit"] is None
    monkeypatch.setenv("EAGLE_LAB_COMMIT", "abc123")
    assert environment._git() == {"commit": "abc123", "dirty": None}
