"""Runs code where this package cannot be imported, as for somebody who only has a folder or a repository id."""

import os
import re
import subprocess
import sys
from pathlib import Path

ABSENT = """
import importlib.abc, sys

class PackageIsAbsent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "adavtp":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, PackageIsAbsent())
sys.path.append(TESTS)
"""
PRINT_MODULES = "\nassert not [name for name in sys.modules if name.partition('.')[0] == 'adavtp']\n"


def run_without_package(code: str, folder: Path) -> str:
    """
    Runs code in `folder`, with nobody there to answer questions.

    Returns:
        What it printed.
    """
    whole = ABSENT.replace("TESTS", repr(str(Path(__file__).parent))) + code + PRINT_MODULES
    done = subprocess.run(
        [sys.executable, "-c", whole],
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def snippet_of(card: str) -> str:
    """The one piece of Python on a card."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return snippet
