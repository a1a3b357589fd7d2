"""Limits of cgroups, read from folders made as both versions of the kernel's make them."""

from __future__ import annotations

import pytest

from eagle_lab.runtime import cgroups


@pytest.fixture
def made(tmp_path):
    """A function that makes the files, by name, and gives the two places that every reader takes."""

    def make(membership, files):
        (tmp_path / "self").write_text(membership)
        for name, text in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(text)
        return tmp_path / "fs", tmp_path / "self"

    return make


@pytest.mark.parametrize(
    ("membership", "files", "wanted"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),  # the level above
        ("0::/a/b\n", {"cpu.max": "200000 100000\n"}, 2.0),  # a container: its own cgroup is the root
        ("0::/a\n", {"unified/a/cpu.max": "300000 100000"}, 3.0),  # both versions mounted
        ("4:cpu,cpuacct:/docker/x\n", {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000\n",
                                        "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n"}, 2.5),
        ("1:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 1.0),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_the_quota_of_both_versions_of_cgroups(made, membership, files, wanted):
    assert cgroups.quota(*made(membership, files)) == wanted


@pytest.mark.parametrize(
    ("membership", "name", "text"),
    [("0::/a\n", "a/cpu.stat", "usage_usec 2500000\nuser_usec 1\n"), ("2:cpuacct:/a\n", "cpuacct/a/cpuacct.usage", "2500000000\n")],
)  # fmt: skip
def test_the_time_of_a_whole_cgroup(made, membership, name, text):
    assert cgroups.seconds(*made(membership, {name: text})) == 2.5


@pytest.mark.parametrize(
    ("membership", "files", "wanted"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "1000\n", "a/b/memory.current": "400\n"}, 600),
        # the level above is the tighter one
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "700\n", "a/memory.current": "650\n"}, 50),
        # pages of files that were read are given back
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 1\ninactive_file 300\n"}, 400),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "1000\n", "memory/x/memory.usage_in_bytes": "900\n",
                           "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n"}, 300),
        ("0::/a\n", {"a/memory.max": "100\n", "a/memory.current": "150\n"}, 0),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "5\n"}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_the_memory_that_is_left_by_both_versions_of_cgroups(made, membership, files, wanted):
    assert cgroups.memory_left(*made(membership, files)) == wanted
