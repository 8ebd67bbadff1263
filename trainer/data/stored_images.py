"""An image as a data set stores it, decoded: bytes, or the path of a file."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ...modeling.processing_adavtp import readable_images


def decoded_image(image: Any) -> Image.Image:
    """
    Args:
        image: `{"bytes": ..., "path": ...}`, one of which is set; or already a PIL image.

    Returns:
        The image as RGB, upright as its EXIF orientation says, as it is when the model is asked about a file.

    Raises:
        OSError, ValueError: if it is missing or broken; the message says how.
    """
    opened = image if isinstance(image, Image.Image) else _opened(_content(image))
    return readable_images([opened])[0]


def _content(image: Any) -> bytes:
    if not isinstance(image, dict):
        raise ValueError(f"is a {type(image).__name__}; expected is a dictionary of `bytes` and `path`")
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is None:
        raise ValueError("there are neither bytes nor a path")
    if content is None:
        if not Path(path).is_file():
            raise ValueError("there is no such file; see that `images` names the folder that paths are relative to")
        content = Path(path).read_bytes()
    if not content:
        raise ValueError("the file is empty")
    return content


# Pillow's decoders raise what they like for a broken file: OSError, SyntaxError, struct.error.
def _opened(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise ValueError("it is of no image format that Pillow knows") from error
    except Exception as error:
        raise ValueError(f"cannot be decoded: {error}") from error
