"""The fingerprint of machine and software, and whether something disturbed a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import BaseModel, ConfigDict

from eagle_lab import ROOT

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
    """The processor: its name, cores, frequency governor, the load when looked at, torch's threads, bytes of memory."""

    name: str
    cores: int
    governor: str | None
    load_1min: float
    torch_threads: int
    memory_bytes: int


class Gpu(_Part):
    """The GPU: None where NVML can't be read, and then throttling can't be seen."""

    name: str
    memory_bytes: int
    multiprocessors: int
    cuda: str | None
    driver: str | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    throttle: list[Cause] | None = None


class Environment(_Part):
    """The machine and the software that a number was measured with."""

    platform: str
    python: str
    cpu: Cpu
    gpu: Gpu | None
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a copy whose history is missing or another one, as in a container, can be told its commit
    told = os.environ.get("EAGLE_LAB_COMMIT")
    if told:
        return {"commit": told, "dirty": None}
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", "eagle_lab")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


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
            governor=_first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            load_1min=round(os.getloadavg()[0], 2),
            torch_threads=torch.get_num_threads(),
            memory_bytes=psutil.virtual_memory().total,
        ),
        gpu=_gpu(device),
        versions={name: _version(name) for name in PACKAGES},
        **_git(),
    )


def machine_key(environment: Environment | dict[str, Any]) -> str:
    """What makes two records comparable: the same processor, and the same GPU where one was used."""
    if isinstance(environment, dict):  # records of schema 1
        gpu, cpu = environment.get("gpu"), environment["cpu"]
        return f"{gpu['name']}" if gpu else f"{cpu['name']}, {cpu['cores']} cores"
    if environment.gpu:
        return environment.gpu.name
    return f"{environment.cpu.name}, {environment.cpu.cores} cores"


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


@dataclass(frozen=True)
class LoadReading:
    """Processor time so far, in seconds: of the whole machine when busy, and of this process."""

    at: float
    busy: float
    own: float


def read_load() -> LoadReading:
    """A reading to give to `foreign_load` later."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # guest time is already inside user time
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = psutil.Process().cpu_times()
    return LoadReading(perf_counter(), total - idle, own.user + own.system)


def foreign_load(before: LoadReading, after: LoadReading) -> float:
    """Share of all cores' time that other processes took between two readings, 0 to 1 (time stolen by a hypervisor included)."""
    available = (after.at - before.at) * (os.cpu_count() or 1)
    if available <= 0:
        return 0.0
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, others / available))
