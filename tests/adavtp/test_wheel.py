"""A wheel has every file of the rooms once, built where the links from `adavtp/` to them are missing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from repository import ROOT

ROOMS = ("configuration", "modeling", "tasks", "trainer", "evaluation", "hub_cards")
LEFT_OUT = {"__pycache__", "adavtp_code", ".gitkeep"}


def _files(folder: Path) -> set[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if not LEFT_OUT & set(path.parts)}


def test_a_wheel_has_every_file_once_where_links_are_missing(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("adavtp", *ROOMS):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=left_out)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for link in [path for path in (tmp_path / "adavtp").iterdir() if path.is_symlink()]:
        link.unlink()
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    (tmp_path / "wheel").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    of_rooms = {f"adavtp/{room}/{name}" for room in ROOMS for name in _files(tmp_path / room)}
    assert set(names) == of_rooms | {f"adavtp/{name}" for name in _files(tmp_path / "adavtp")}
