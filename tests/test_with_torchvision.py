"""The tests that need torchvision, in a process that has it: see with_torchvision/conftest.py."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from repository import ROOT
from torchvision_beside import BESIDE


def test_what_needs_torchvision_works_where_it_is() -> None:
    if not BESIDE.is_dir() and find_spec("torchvision") is None:
        pytest.skip(f"torchvision is not installed; `make test` lays it into {BESIDE}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/with_torchvision"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:])
    assert done.returncode == 0, done.stderr[-3000:]
