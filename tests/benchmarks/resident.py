"""Memory of this process and of the machine, in bytes."""

import resource
from pathlib import Path


def resident() -> int:
    """What is in memory at present."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


def high_water() -> int:
    """The most that was ever in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available() -> int:
    """What the machine can still give."""
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024
