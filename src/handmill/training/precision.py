"""How fast this machine is, and which arithmetic pays on it: measured in the first steps, not assumed."""

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.training.sharding import split

COMPILE_SECONDS = 90.0  # a cold compilation of a small decoder took 60 to 90 s on two cores
COMPILE_GAIN = 0.25  # the share of a step that compiling must save to be worth trying


class HalfPrecision(nn.Module):
    """Runs a network on bf16 copies of its fp32 parameters; gradients arrive at the fp32 ones.

    One cast a parameter and pass. Autocast casts the input of every operator instead, which costs a small network
    on a CPU more than it saves. A network may name the beginnings of `exact` parameters, which stay as they are. So do
    those that are split over processes: they come gathered in bf16.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        exact: tuple[str, ...] = getattr(network, "exact", ())
        self.cast = {n for n, p in network.named_parameters() if not (n.startswith(exact) or split(p))}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        halves = {n: p.to(torch.bfloat16) for n, p in self.network.named_parameters() if n in self.cast}
        return torch.func.functional_call(self.network, halves, args, kwargs)


def bare(module: nn.Module) -> nn.Module:
    """The network itself, from within what training wrapped it in."""
    while isinstance(inner := getattr(module, "module", None) or (
            module.network if isinstance(module, HalfPrecision) else None), nn.Module):
        module = inner
    return module


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: each step asks for the same tensors, and new pages cost a fifth of its time."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    libc.mallopt(-2, 64 << 20)  # M_TOP_PAD


def free_threads() -> int:
    """Threads to compute with: one a core, less the cores that other programs have kept busy for the last minute.

    Threads wait for each other hundreds of times a step: two on two cores, one of which is taken, were ten times
    slower than one. OMP_NUM_THREADS, where it is set, is obeyed.
    """
    import psutil

    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or threads == 1:
        return threads
    now = psutil.cpu_percent(0.05) / 100 * (psutil.cpu_count() or 1)
    return max(1, threads - round(min(now, psutil.getloadavg()[0])))


def cached_kernels() -> None:
    """Keep what torch.compile builds between runs: the first step took 92 s cold and 7 s with the cache kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "handmill" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Measured FLOP/s of a square matrix product: what the best step could reach."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    a @ b
    synchronise(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(network: nn.Module, loss: Callable[[nn.Module], Tensor], device: torch.device,
                 repeats: int = 2) -> float:
    """Seconds of one forward and backward pass: the best of `repeats` after one warm-up. Gradients are dropped."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss(network).backward()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    network.zero_grad(set_to_none=True)
    return best


def choose_precision(network: nn.Module, loss: Callable[[nn.Module], Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of a pass in each precision this device can do, {"fp32": s, "bf16": s}; the caller takes the least."""
    seconds = {"fp32": step_seconds(network, loss, device)}
    if device.type != "cuda" or torch.cuda.is_bf16_supported():
        seconds["bf16"] = step_seconds(HalfPrecision(network), loss, device)
    return seconds


def compiler_found(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cuda":
        import importlib.util

        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))


def worth_compiling(step: float, steps: int, device: torch.device) -> bool:
    """Whether the planned run is long enough for compiling to pay back: saved seconds above its cost."""
    return compiler_found(device) and step * steps * COMPILE_GAIN > COMPILE_SECONDS


def machine() -> dict[str, Any]:
    """What a figure was measured on: processor, cores, memory, GPU, versions."""
    import psutil

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": model, "cores": cores, "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
             "system": platform.system(),
             "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
