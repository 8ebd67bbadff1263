"""Which files data may name as images, and that what is no image is said and not waited for."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from huggingface_hub import constants
from PIL import Image

from adavtp.tasks import stored_images
from adavtp.tasks.stored_images import decoded_image, image_file, with_undecoded_images


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (220, 10, 10)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images beside one that is nobody's business, with links into both."""
    draw(tmp_path / "secret" / "x.png")
    folder = tmp_path / "images"
    draw(folder / "deep" / "a.png")
    (folder / "inside.png").symlink_to("deep/a.png")
    (folder / "outside.png").symlink_to("../secret/x.png")
    (folder / "elsewhere").symlink_to(tmp_path / "secret")
    (folder / "round").symlink_to("round")
    return folder


INSIDE = [
    "deep/a.png",
    "./deep/a.png",
    "deep/../deep/a.png",
    "inside.png",
    "{folder}/deep/a.png",
    "{folder}/inside.png",
]
OUTSIDE = [
    "../secret/x.png",
    "deep/../../secret/x.png",
    "{folder}/../secret/x.png",
    "{parent}/secret/x.png",
    "outside.png",
    "elsewhere/x.png",
    "../images2/x.png",
    "/proc/self/environ",
    "/dev/zero",
]


@pytest.mark.parametrize("name", INSIDE)
def test_a_name_that_stays_inside_is_followed(folder: Path, name: str) -> None:
    name = name.format(folder=folder, parent=folder.parent)
    assert os.path.samefile(image_file(name, folder), folder / "deep/a.png")
    assert decoded_image({"path": str(folder / name)}, folder).size == (4, 4)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_or_a_link_that_leaves_is_refused_unless_paths_are_trusted(folder: Path, name: str) -> None:
    draw(folder.parent / "images2" / "x.png")
    name = name.format(folder=folder, parent=folder.parent)
    with pytest.raises(ValueError, match="leads out of .*`trust_image_paths`"):
        image_file(name, folder)
    with pytest.raises(ValueError, match="leads out of"):
        decoded_image({"path": str(folder / name)}, folder)
    assert image_file(name, folder, trust_paths=True) == folder / name
    if name.endswith(".png"):
        assert decoded_image({"path": str(folder / name)}).size == (4, 4)


@pytest.mark.parametrize("name", ["http://localhost:1/a.png", "file:///etc/passwd", "hf://a/b.png", "a\0.png"])
def test_a_url_is_not_followed(folder: Path, name: str) -> None:
    for trusts in (False, True):
        with pytest.raises(ValueError, match="expected is the path of a file"):
            image_file(name, folder, trusts)
    with pytest.raises(ValueError, match="expected is the path of a file"):
        decoded_image({"path": name}, folder)


def test_a_folder_that_is_a_link_is_the_folder_it_leads_to(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert decoded_image({"path": str(folder.parent / "link" / "inside.png")}, folder.parent / "link").size == (4, 4)


def test_links_of_a_snapshot_in_the_hub_s_cache_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot, blob = tmp_path / "hub/datasets--a--b/snapshots/1", tmp_path / "hub/datasets--a--b/blobs/0"
    draw(blob.with_suffix(".png")).rename(blob)
    draw(tmp_path / "secret.png")
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../blobs/0")
    (snapshot / "b.png").symlink_to(tmp_path / "secret.png")
    assert decoded_image({"path": str(snapshot / "a.png")}, snapshot).size == (4, 4)
    with pytest.raises(ValueError, match="leads out of"):
        decoded_image({"path": str(snapshot / "b.png")}, snapshot)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


# What stands in the place of an image, and what is said of it.
NO_IMAGES: dict[str, tuple[Any, str]] = {
    "nothing": (lambda path: None, "there is no such file"),
    "a folder": (Path.mkdir, "there is no such file"),
    "a pipe": (fifo, "there is no such file"),
    "a link in a circle": (lambda path: path.symlink_to(path.name), "there is no such file"),
    "no bytes": (Path.touch, "the file is empty"),
    "text": (lambda path: path.write_text("secret: 1234"), "^it is of no image format that Pillow knows$"),
    "HTML": (lambda path: path.write_text("<html>404</html>"), "^it is of no image format that Pillow knows$"),
    "an SVG": (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "^it is of no image format"),
    "a terabyte of nothing": (sparse, "the file has 1099511627776 bytes; an image has at most"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "^it is of no image format"),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_is_no_image_is_said_at_once_and_not_quoted(tmp_path: Path, case: str) -> None:
    make, reason = NO_IMAGES[case]
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=reason):
        decoded_image({"path": str(tmp_path / "a.png")}, tmp_path)


def test_a_name_that_is_too_long_is_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        decoded_image({"path": str(tmp_path / ("a" * 100_000))}, tmp_path)


def test_a_data_set_s_images_stay_undecoded_wherever_they_are(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    part = {"type": Value("string"), "image": ImageFeature()}
    features = Features(
        {"image": ImageFeature(), "images": List(ImageFeature()), "messages": List({"content": List(part)})}
    )
    row = {"image": stored, "images": [stored], "messages": [{"content": [{"type": "image", "image": stored}]}]}
    rows = with_undecoded_images(Dataset.from_list([row], features=features))
    assert rows[0] == row
    assert stored_images.with_undecoded_images(rows) is rows
