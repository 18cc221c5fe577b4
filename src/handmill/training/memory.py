"""How much memory this process has, how much more it can get, and how much a piece of work takes, tensor by tensor."""

import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNLIMITED = 1 << 60  # bytes; what version 1 of control groups says for no limit is above it


def used(device: torch.device) -> int:
    """Bytes in use now: of this process's memory, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def mapped(device: torch.device) -> int:
    """Bytes of files (libraries, memory-mapped data) among `used`; 0 where the system does not tell."""
    import psutil

    return int(getattr(psutil.Process().memory_info(), "shared", 0)) if device.type == "cpu" else 0


def peak(device: torch.device) -> int:
    """The most bytes ever in use by this process, or by its tensors on a GPU since the count was last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would include the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return used(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def room(device: torch.device) -> int:
    """Bytes this process can still take: the least that free memory, control groups and resource limits leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_group_room(), *_resource_room()]))


def _group_room(table: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group around this process leaves, in version 2 (memory.max) and version 1."""
    found = []
    for line in table.read_text().splitlines() if table.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, now, idle = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, now = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(top) and (folder / limit).is_file():
                found += _left(folder, limit, now, idle)
    return found


def _left(folder: Path, limit: str, now: str, idle: str) -> list[int]:
    """The limit less what is in use, cached files that nobody reads left out; nothing where there is no limit."""
    try:
        text = (folder / limit).read_text().strip()
        if text == "max" or int(text) >= UNLIMITED:
            return []
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [int(text) - int((folder / now).read_text()) + int(stat.get(idle, 0))]
    except (OSError, ValueError):
        return []


def _resource_room() -> list[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    if sys.platform == "win32":
        return []
    import resource

    import psutil

    now = psutil.Process().memory_info()
    limits = ((resource.RLIMIT_AS, now.vms), (resource.RLIMIT_DATA, getattr(now, "data", now.vms)))
    return [soft - taken for kind, taken in limits if (soft := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, each storage once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


class Account(TorchDispatchMode):
    """Bytes of the storages that operators return, counted until each is freed.

    MemTracker's total, without the compiler that importing MemTracker brings along: 0.9 s of every start.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch imports the compiler to keep it away from this class
        return False

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in held:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += self.live[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def counted(work: Callable[[], Any], held: Iterable[nn.Module | Tensor]) -> int:
    """The most bytes that tensors on one device took while `work()` ran, with all that `held` holds."""
    tensors = [t for h in held for t in ([*h.parameters(), *h.buffers()] if isinstance(h, nn.Module) else [h])]
    with Account(tensors) as account:
        work()
    return account.peak


def tracked(work: Callable[[], Any], held: Iterable[nn.Module | Tensor], device: torch.device) -> int:
    """`counted` by PyTorch's MemTracker, with tensors that may hold no data.

    Exact for what operators return, blind to what a kernel takes and gives back inside.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    class Total(MemTracker):
        """Without the figures of each module: they cost most of the time, and need parameters that are leaves."""

        def _pre_fw_hook(self, *_: Any) -> None: ...
        def _post_fw_hook(self, *_: Any) -> None: ...
        def _pre_bw_hook(self, *_: Any) -> None: ...
        def _post_bw_hook(self, *_: Any) -> None: ...

    tracker = Total()
    tracker.track_external(*held)
    with tracker:
        work()
    snapshot = tracker.get_tracker_snapshot("peak")
    return int(sum(kinds["Total"] for place, kinds in snapshot.items() if place.type == device.type))
