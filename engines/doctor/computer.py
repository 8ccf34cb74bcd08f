"""What a report tells of the computer, beside what the checks are about."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from pathlib import Path

_CARD = (
    *("name", "compute_cap", "driver_version", "vbios_version", "memory.total", "memory.used"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("power.limit", "power.default_limit", "power.max_limit", "temperature.gpu"),
    *("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max"),
    *("persistence_mode", "compute_mode", "ecc.mode.current"),
)
"""What nvidia-smi is asked of each card: nothing that tells one card of a kind from another."""
_UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
_SECONDS = 60


def find_computer() -> dict[str, str]:
    """Python, system and processor, by what they are called."""
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        system = "unknown"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": system,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "C library": " ".join(platform.libc_ver()) or "unknown",
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores to run on",
        "memory": f"{memory / 1e9:.1f} GB",
    }


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else "unknown"


def find_cards() -> tuple[list[dict[str, str]], str]:
    """What nvidia-smi tells of each card, by its own names; or none and why, a sentence."""
    fields = list(_CARD)
    while True:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
        except OSError as error:
            return [], f"nvidia-smi cannot be run ({error.strerror})."
        except subprocess.TimeoutExpired:
            return [], f"nvidia-smi does not answer within {_SECONDS} s."
        unknown = _UNKNOWN_FIELD.search(result.stdout + result.stderr)
        if unknown is None or unknown[1] not in fields:
            break
        fields.remove(unknown[1])  # by a driver that is older or newer
    if result.returncode:
        told = (result.stdout + result.stderr).split()
        return [], f"nvidia-smi ends with code {result.returncode}: {' '.join(told)}"
    rows = csv.reader(result.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, row, strict=False)) for row in rows if row], ""
