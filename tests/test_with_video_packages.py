"""Processors with torchvision, which has to be there when transformers is imported, and without."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoProcessor

from repository import ROOT
from tiny_processors import LOADED_WITHOUT_TORCHVISION, WITH_VIDEOS, family_processor, processor_parts
from video_packages import BESIDE

without_torchvision = pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")


def test_what_needs_torchvision_works_where_it_is() -> None:
    if not BESIDE.is_dir() and find_spec("torchvision") is None:
        pytest.skip(f"torchvision is not installed; `make test` lays it into {BESIDE}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/with_video_packages"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:])
    assert done.returncode == 0, done.stderr[-3000:]


@without_torchvision
@pytest.mark.parametrize("name", LOADED_WITHOUT_TORCHVISION)
def test_without_torchvision_processors_of_images_alone_load(name: str, tmp_path: Path) -> None:
    family_processor(name).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == processor_parts(name).processor[0]
    assert type(processor.image_processor).__name__.endswith("Pil")


@without_torchvision
@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_without_torchvision_processors_that_read_videos_say_that_they_want_it(name: str, tmp_path: Path) -> None:
    family_processor(name).save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(
        f'{{"video_processor_type": "{processor_parts(name).videos[0]}"}}'
    )
    with pytest.raises((ValueError, ImportError), match="(?i)requires.*torchvision"):
        AutoProcessor.from_pretrained(tmp_path)
