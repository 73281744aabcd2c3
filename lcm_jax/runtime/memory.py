"""Memory at hand: what may still be taken on the devices and on this machine."""

import resource
from collections.abc import Sequence
from pathlib import Path

import jax

GIB = 2**30
_PAGE = resource.getpagesize()


def of_devices(devices: Sequence[jax.Device]) -> int:
    """Bytes on the fullest of these devices; those of this machine if the devices have no memory of their own."""
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    stats = [found for found in stats if "bytes_limit" in found]
    return min((found["bytes_limit"] - found["bytes_in_use"] for found in stats), default=of_host())


def of_host() -> int:
    """Bytes on this machine: free, or of caches, within the limits of this process (`ulimit -v`) and its container."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    for line in _lines("/proc/self/statm") if limit != resource.RLIM_INFINITY else ():
        found.append(limit - int(line.split()[0]) * _PAGE)
    found += [int(line) for line in _lines("/sys/fs/cgroup/memory.max") if line.isdigit()]  # in use: caches count, too
    return max(0, min(found, default=2**63))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
