"""What a visitor sends, page or program alike, read and checked before anything is computed.

A file is judged by its header, so that its pixels are decoded only where they are few enough for a moment's work.
Whatever is not allowed is a ValueError, whose message is the sentence that the visitor gets.
"""

import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

FILE_SIZE = "20mb"
MAX_PIXELS = 25_000_000
# Of the longer side to the shorter. Image processors scale by the shorter one, so that a line that is one pixel wide
# would grow to millions.
MAX_RATIO = 50
MAX_CHARACTERS = 1000
# No other decoder is tried: some of them run programs, or know no end.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

UPLOADED = {"_type": "gradio.FileData"}
_BREAKS = "\t\n\r"


def image_file(sent: Any) -> Path:
    """The file of an image, as Gradio hands it over once it has it among its uploads."""
    if not isinstance(sent, dict) or not isinstance(sent.get("path"), str) or not Path(sent["path"]).is_file():
        raise ValueError("There is no image yet. Upload one first.")
    return Path(sent["path"])


def read_image(path: Path) -> Image.Image:
    """The image, upright and decoded; of an animation the first frame."""
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(_too_large("too many")) from None
    # Decoders raise what they like for a broken file.
    except Exception:
        raise ValueError(
            "This file is no image that can be read here; PNG, JPEG, WebP, GIF and BMP files can."
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(f"{width} x {height}"))
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"The image has {width} x {height} pixels; one side may be at most {MAX_RATIO} times as long as the other."
        )
    try:
        image.load()
    except Exception:
        raise ValueError("The image is broken: it cannot be decoded. Upload an intact file.") from None
    try:
        return ImageOps.exif_transpose(image)
    # Metadata that cannot be read do not say that the image stands otherwise.
    except Exception:
        return image


def _too_large(size: str) -> str:
    return f"The image has {size} pixels; it may have {MAX_PIXELS // 10**6} million at most. Upload a smaller one."


def read_question(sent: Any) -> str:
    """The question, of at most `MAX_CHARACTERS` that can be printed."""
    if sent is not None and not isinstance(sent, str):
        raise ValueError("The question has to be text.")
    if not (sent or "").strip():
        raise ValueError("There is no question yet. Write one about the image.")
    if len(sent) > MAX_CHARACTERS:
        raise ValueError(f"The question has {len(sent):,} characters; it may have {MAX_CHARACTERS:,} at most.")
    if unprintable := [char for char in sent if unicodedata.category(char) in ("Cc", "Cs") and char not in _BREAKS]:
        raise ValueError(f"The question has a character that cannot be printed, U+{ord(unprintable[0]):04X}.")
    return sent


def read_budget(sent: Any) -> float:
    """The budget as a fraction: the browser sends 0 and 1 as whole numbers, which `generate` takes for counts."""
    if isinstance(sent, bool) or not isinstance(sent, int | float) or not 0 <= sent <= 1:
        raise ValueError("The budget has to be a number from 0 to 1.")
    return float(sent)


def read_choice(sent: Any, choices: list[str]) -> str:
    """One of the names that are offered."""
    if sent not in choices:
        raise ValueError(f"What chooses has to be one of {', '.join(choices)}.")
    return sent


def is_no_upload(sent: Any) -> bool:
    """
    Whether something names a file that is no upload: one elsewhere, which Gradio would fetch, however large, before
    anybody can look; or one without Gradio's mark, by which it checks that a file of this machine was uploaded.
    """
    if isinstance(sent, dict):
        path = sent.get("path")
        if path is not None and (str(path).startswith(("http://", "https://")) or sent.get("meta") != UPLOADED):
            return True
        return any(map(is_no_upload, sent.values()))
    return isinstance(sent, list) and any(map(is_no_upload, sent))
