"""The fingerprint of machine and software, and whether something disturbed a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import BaseModel, ConfigDict

from eagle_lab import ROOT
from eagle_lab.engines.revision import changed, git
from eagle_lab.measure.cores import affinity, usable_cores
from eagle_lab.runtime import cgroups
from eagle_lab.runtime.cgroups import read_text

if TYPE_CHECKING:  # whoever only reads a record shall not wait for torch
    import torch

PACKAGES = ("torch", "transformers", "numpy", "scipy", "triton", "eagle-lab")


class Cause(StrEnum):
    """What disturbed a pair: other programs on the cores, or one of NVML's reasons to hold a GPU's clocks down."""

    FOREIGN_LOAD = "foreign load"
    POWER_CAP = "software power cap"
    SLOWDOWN = "hardware slowdown"
    THERMAL = "software thermal slowdown"
    HARDWARE_THERMAL = "hardware thermal slowdown"
    POWER_BRAKE = "hardware power brake"


THROTTLE_BITS = {
    0x4: Cause.POWER_CAP,
    0x8: Cause.SLOWDOWN,
    0x20: Cause.THERMAL,
    0x40: Cause.HARDWARE_THERMAL,
    0x80: Cause.POWER_BRAKE,
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cpu(_Part):
    """The processor: its name, the machine's cores, frequency governor, load when looked at, torch's threads, bytes of memory.

    usable: cores' worth of time that this process may use, the smaller of `affinity` (the number of cores that it may
    run on) and `quota` (the cgroup's limit; None without one). Records from before these fields have None in all three.
    """

    name: str
    cores: int
    governor: str | None
    load_1min: float
    torch_threads: int
    memory_bytes: int
    usable: float | None = None
    affinity: int | None = None
    quota: float | None = None


class Gpu(_Part):
    """The GPU: None where NVML can't be read, and then throttling can't be seen.

    visible: how many GPUs this process may use (CUDA_VISIBLE_DEVICES); uuid: which one this is, whatever its number here.
    """

    name: str
    memory_bytes: int
    multiprocessors: int
    cuda: str | None
    driver: str | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    throttle: list[Cause] | None = None
    visible: int | None = None
    uuid: str | None = None


class Environment(_Part):
    """The machine and the software that a number was measured with."""

    platform: str
    python: str
    cpu: Cpu
    gpu: Gpu | None
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None


def _cpu_name() -> str:
    """What the system calls its processor: /proc/cpuinfo on x86, `lscpu` on ARM, `sysctl` on a Mac; else its parts."""
    found = _fields(read_text("/proc/cpuinfo"))
    if name := found.get("model name"):
        return name
    if name := _output("sysctl", "-n", "machdep.cpu.brand_string"):
        return name
    told = _fields(_output("lscpu") or "")
    if (name := told.get("Model name", "-")) != "-":
        return f"{told.get('Vendor ID', '')} {name}".strip()
    parts = [found[key] for key in ("CPU implementer", "CPU part") if key in found]
    return " ".join([platform.processor() or platform.machine(), *parts])


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _fields(text: str) -> dict[str, str]:
    """ "name : value" lines; the first of several with one name."""
    rows = [line.partition(":") for line in reversed(text.splitlines())]
    return {name.strip(): value.strip() for name, _, value in rows}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    # a copy whose history is missing or another one, as in a container, can be told its commit
    told = os.environ.get("EAGLE_LAB_COMMIT")
    if told:
        return {"commit": told, "dirty": None}
    return {"commit": git(ROOT, "rev-parse", "HEAD", seconds=10), "dirty": changed(ROOT, seconds=10)}


def _gpu(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    import torch

    found = torch.cuda.get_device_properties(device)
    gpu: dict[str, Any] = {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "visible": torch.cuda.device_count(),
        "uuid": str(found.uuid),
    }
    handle = _nvml_handle(device)
    if handle is None:
        return Gpu(**gpu)
    import pynvml

    return Gpu(
        **gpu,
        driver=pynvml.nvmlSystemGetDriverVersion(),
        sm_mhz=pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        memory_mhz=pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        power_w=pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        throttle=throttle_reasons(device),
    )


def _nvml_handle(device: torch.device) -> Any | None:
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # CUDA_VISIBLE_DEVICES renumbers, NVML doesn't
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # any failure of the driver's library means the same: it can't be read
        return None


def throttle_reasons(device: torch.device) -> list[Cause]:
    """Why the GPU's clocks are held down right now; empty on other devices and where NVML can't be read."""
    if device.type != "cuda":
        return []
    handle = _nvml_handle(device)
    if handle is None:
        return []
    import pynvml

    bits = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return [cause for bit, cause in THROTTLE_BITS.items() if bits & bit]


def fingerprint(device: torch.device | str = "cpu") -> Environment:
    """What a reader must know of the machine and the software to judge a number."""
    import torch

    device = torch.device(device)
    return Environment(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=Cpu(
            name=_cpu_name(),
            cores=os.cpu_count() or 1,
            usable=usable_cores(),
            affinity=len(affinity()),
            quota=cgroups.quota(),
            governor=read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
            load_1min=round(os.getloadavg()[0], 2),
            torch_threads=torch.get_num_threads(),
            memory_bytes=psutil.virtual_memory().total,
        ),
        gpu=_gpu(device),
        versions={name: _version(name) for name in PACKAGES},
        **_git(),
    )


def machine_key(environment: Environment) -> str:
    """What makes two records comparable: the same GPU where one was used, else the same processor and as many usable cores."""
    if environment.gpu:
        return environment.gpu.name
    cpu = environment.cpu
    cores = cpu.cores if cpu.usable is None else cpu.usable
    return f"{cpu.name}, {cores:g} core{'s' * (cores != 1)}"


def moved(before: Environment, now: Environment) -> list[str]:
    """What differs so that pairs taken in both don't belong together, in words for an error."""
    told = []
    if machine_key(before) != machine_key(now):
        told.append(f"{machine_key(before)}, and this is {machine_key(now)}")
    if before.cpu.torch_threads != now.cpu.torch_threads:
        told.append(f"{before.cpu.torch_threads} threads, and now there are {now.cpu.torch_threads}")
    for name, version in before.versions.items():
        if (found := now.versions.get(name)) != version:
            told.append(f"{name} {version}, and here is {found}")
    return told
