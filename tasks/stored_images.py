"""Images as data name and store them: which names are followed, and what they hold, decoded.

Data come from others. An image's name in them stays inside the folder of the images: an absolute path, a `..` or a
link that leads out of it is refused, unless the user trusts the data's paths. URLs are not followed at all.
"""

import binascii
import dataclasses
import io
import os
import re
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..modeling.processing_adavtp import readable_images

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Bytes. No image that Pillow decodes is larger; a file that only claims to be one may be.
LARGEST_FILE = 2**30


def image_file(name: str, folder: str | Path, trust_paths: bool = False) -> Path:
    """
    Where the image is that data name; whether there is such a file, nobody has looked.

    Args:
        name: of an image, as it stands in data.
        folder: of the images. In a cache of the Hub's or of `datasets`, where a file is a link to another folder, a
            name may lead anywhere in these caches.
        trust_paths: follow names and links that lead out of the folder.

    Raises:
        ValueError: if the name is no path, or leads out of the folder.
    """
    if "\0" in name or "://" in name:
        raise ValueError("expected is the path of a file; download what a URL names, and write its path")
    path = Path(folder, name)
    if not trust_paths:
        require_inside(path, folder)
    return path


def require_inside(path: str | Path, folder: str | Path) -> None:
    """Raises `ValueError` if a path, with its links followed, leads out of a folder; see [`image_file`]."""
    place, roots = Path(os.path.realpath(path)), [Path(os.path.realpath(folder))]
    caches = [Path(os.path.realpath(cache)) for cache in hub_caches()]
    if any(roots[0].is_relative_to(cache) for cache in caches):
        roots += caches
    if not any(place.is_relative_to(root) for root in roots):
        raise ValueError(
            f"the path leads out of {str(folder)!r}; name the folder that all of them lie in, or have such paths and "
            "links followed with `trust_image_paths`"
        )


def hub_caches() -> tuple[str, str]:
    """The folders in which the Hub and `datasets` keep what they downloaded."""
    from datasets import config
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE), str(config.HF_DATASETS_CACHE)


def embedded_image(name: str) -> bytes | None:
    """
    The bytes of an image that is written as a data URL, `data:image/png;base64,...`; `None` for any other name.

    Raises:
        ValueError: if what it has is no base64.
    """
    if not name.startswith("data:"):
        return None
    try:
        return b64decode(re.sub(r"^data:[^,]*;base64,", "", name), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("expected is a data URL of an image in base64, data:image/png;base64,...") from error


def with_undecoded_images(rows: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
    """The data set with images, videos and sounds as they are stored: `datasets` would open any path to decode one."""
    for name, feature in (rows.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            rows = rows.cast_column(name, undecoded)
    return rows


def _undecoded(feature: Any) -> Any:
    from datasets import List

    if getattr(feature, "decode", False) is True:
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    return {name: _undecoded(own) for name, own in feature.items()} if isinstance(feature, dict) else feature


def decoded_image(image: Any, folder: str | Path | None = None) -> Image.Image:
    """
    Args:
        image: `{"bytes": ..., "path": ...}`, one of which is set; or already a PIL image.
        folder: that a path may not lead out of; `None` follows every path.

    Returns:
        The image as RGB, upright as its EXIF orientation says, as it is when the model is asked about a file.

    Raises:
        OSError, ValueError: if it is missing or broken, or its path leads out of the folder; the message says how.
    """
    opened = image if isinstance(image, Image.Image) else opened_image(_content(image, folder))
    return readable_images([opened])[0]


def image_size(image: Any, folder: str | Path | None = None) -> tuple[int, int]:
    """Width and height of what [`decoded_image`] gives, of which only the head is read. Raises as it does."""
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).size
    opened = opened_image(_content(image, folder), load=False)
    is_lying = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return opened.size[::-1] if is_lying else opened.size


def _content(image: Any, folder: str | Path | None) -> bytes:
    if not isinstance(image, dict):
        raise ValueError(f"is a {type(image).__name__}; expected is a dictionary of `bytes` and `path`")
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is None:
        raise ValueError("there are neither bytes nor a path")
    if content is None:
        path = image_file(path, folder or ".", trust_paths=folder is None)
        if not os.path.isfile(path):
            raise ValueError("there is no such file; see that `images` names the folder that paths are relative to")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"the file has {size} bytes; an image has at most {LARGEST_FILE}")
        content = path.read_bytes()
    if not content:
        raise ValueError("the file is empty")
    return content


# Pillow's decoders raise what they like for a broken file: OSError, SyntaxError, struct.error.
def opened_image(content: bytes, load: bool = True) -> Image.Image:
    """An encoded image in its own mode, loaded, or only its head read; `ValueError` if it is broken."""
    try:
        image = Image.open(io.BytesIO(content))
        if load:
            image.load()
        return image
    except UnidentifiedImageError as error:
        raise ValueError("it is of no image format that Pillow knows") from error
    except Exception as error:
        raise ValueError(f"cannot be decoded: {error}") from error
