"""The typefaces of a page, cut into glyphs of one patch each.

The faces are those that matplotlib installs: DejaVu, STIX and Computer Modern. They are divided between the splits: a
face seen in training is never shown in validation or test.
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .page import CELL, GLYPHS

FACES: dict[str, tuple[str, ...]] = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "STIXGeneral",
        "STIXGeneralItalic",
        "cmr10",
        "cmss10",
        "cmtt10",
    ),
    "validation": ("DejaVuSansMono-BoldOblique", "cmb10"),
    "test": ("DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "STIXGeneralBol"),
}
"""Which faces each split is set in."""

# Glyphs are drawn this many times larger, moved by whole large pixels, and averaged down to their place.
_ZOOM = 4
# Of a cell's height, from the top, where the letters stand, and the size of the face.
_BASELINE, _SIZE = 0.8, 1.0
# By how many large pixels a glyph may be out of its place, to either side and up or down.
NUDGE = 2


@cache
def glyph_masks(face: str) -> np.ndarray:
    """
    Every glyph of a face at every nudge, as opacities from 0 to 1.

    Args:
        face: one of the names in `FACES`.

    Returns:
        `[num_glyphs, 2 NUDGE + 1, 2 NUDGE + 1, CELL, CELL]` float32: glyph, nudge down, nudge right, row, column. A
        glyph that is wider than its cell is drawn narrower.
    """
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(fonts / f"{face}.ttf"), round(_SIZE * CELL * _ZOOM))
    large = np.stack([_large_glyph(glyph, font) for glyph in GLYPHS])
    moved = [[np.roll(large, (down, right), axis=(1, 2)) for right in _nudges()] for down in _nudges()]
    small = np.array(moved, dtype=np.float32).reshape(len(moved), -1, len(GLYPHS), CELL, _ZOOM, CELL, _ZOOM)
    return np.ascontiguousarray(small.mean(axis=(4, 6)).transpose(2, 0, 1, 3, 4))


def _nudges() -> range:
    return range(-NUDGE, NUDGE + 1)


def _large_glyph(glyph: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    side = CELL * _ZOOM
    left, top, right, bottom = font.getbbox(glyph, anchor="ls")
    drawn = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(drawn).text((-left, -top), glyph, fill=255, font=font, anchor="ls")
    if drawn.width > side - 2:
        drawn = drawn.resize((side - 2, drawn.height), Image.Resampling.BOX)
    cell = Image.new("L", (side, side))
    cell.paste(drawn, ((side - drawn.width) // 2, round(_BASELINE * side) + top))
    return np.asarray(cell, dtype=np.float32) / 255
