"""Memory that this process may still take, within the limits of its control groups."""

import re
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> float | None:
    """Free memory of a CUDA device or of this machine's CPU, in bytes; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _cached_bytes(device)
    if device.type != "cpu":
        return None
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return min(1024.0 * int(available[1]), _left_in_cgroup()) if available else None


def _cached_bytes(device: torch.device) -> int:
    """Memory that torch has reserved on a CUDA device and that no tensor uses."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _left_in_cgroup(groups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Memory that the limits of this process's control group and its parents leave; infinite without any."""
    left = float("inf")
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, usage = groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        # in a container the path may be the host's; the container's own group is then at the top
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                left = min(left, _limit(folder, limit) - _used(folder, usage))
    return max(0.0, left)


def _limit(folder: Path, name: str) -> float:
    try:
        text = (folder / name).read_text().strip()
    except OSError:
        return float("inf")
    return float("inf") if text == "max" else float(text)


def _used(folder: Path, name: str) -> float:
    """Bytes in use without pages of files that the system can drop."""
    try:
        used, statistics = float((folder / name).read_text()), (folder / "memory.stat").read_text()
    except OSError:
        return 0.0
    inactive = dict(line.split() for line in statistics.splitlines())
    return used - float(inactive.get("total_inactive_file", inactive.get("inactive_file", 0)))
