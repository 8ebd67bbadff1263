"""What a measurement has to say about itself to be repeated: versions, command, machine and seed."""

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console


def circumstances(script: str, arguments: Sequence[str], seed: int, device: torch.device) -> dict[str, Any]:
    """
    Describes a measurement, without naming the host.

    Args:
        script: the benchmark's file name.
        arguments: the command line behind it.
        seed: of weights and inputs.
        device: where it ran.

    Returns:
        `command`, `versions`, `machine` and `seed`, ready for JSON.
    """
    on_gpu = device.type == "cuda"
    return {
        "command": f"python benchmarks/{script} {shlex.join(arguments)}".rstrip(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers")},
        "machine": {
            "processor": _processor_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        },
        "seed": seed,
    }


def _processor_name() -> str:
    """The processor's model; `platform.processor()` is empty or only an architecture on Linux."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Writes a result, if a file was named."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def console() -> Console:
    """The terminal; where output is redirected and has no width, one that is wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 140)
