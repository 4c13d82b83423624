"""Free memory. In: a device; out: the bytes that this process can still allocate, or None: unknown."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

if sys.platform != "win32":
    import resource

# Of control groups, version 2 and 1: the folder, then the names of the limit, of the memory in use, and of its part in
# cached files, which the system frees when needed.
_CGROUP = Path("/proc/self/cgroup")  # which groups this process is in
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int | None:
    """On a GPU what is free there; on a CPU this rank's share of what the machine, its control group and its limit on
    address space leave. Swap counts, because a run that swaps is slow but works."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun: these ranks share the memory
    shared = [_free_on_machine(), *_free_in_groups()]
    return min(min(shared) // ranks_here, _free_address_space())


def _free_on_machine() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"])


def _free_in_groups() -> list[int]:
    """What is left in this process's control group, and in each one around it."""
    free = []
    for line in _CGROUP.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top, limit_name, taken_name, cached_name = _GROUPS[number != "0"]
        for part in [Path(path), *Path(path).parents]:
            # In a container the path may be that of the host, and the group itself be mounted at the top.
            folder = Path(top) / part.relative_to("/")
            with suppress(OSError, ValueError):  # there is no such group, or no limit: "max"
                limit_bytes, taken_bytes = (int((folder / name).read_text()) for name in (limit_name, taken_name))
                rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
                cached_bytes = sum(int(row[1]) for row in rows if row[0] == cached_name)
                free.append(max(0, limit_bytes - taken_bytes + cached_bytes))
    return free


def _free_address_space() -> int:
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes == resource.RLIM_INFINITY:
        return sys.maxsize
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return max(0, limit_bytes - pages * resource.getpagesize())
