"""Which digit and which colour every patch of a scene shows: what a vision tower learns from before any question."""

import numpy as np

from .scene import COLOURS, Scene, is_whole

# Labels of a patch that no digit covers.
BACKGROUND_DIGIT, BACKGROUND_COLOUR = 10, len(COLOURS)
_PATCH_COVERAGE = 0.2


def patch_labels(scene: Scene, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    A patch belongs to the digit whose box covers most of it, provided that the box covers a fifth of it. Boxes rather
    than ink, so that the inside of a 0 counts as part of the 0.

    Args:
        scene: the scene.
        patch_size: side of the square patches in pixels; it must divide the picture's side.

    Returns:
        Digits, 0 to 9 or `BACKGROUND_DIGIT`, and colours, indices into `COLOURS` or `BACKGROUND_COLOUR`: int64
        `[num_patches]`, row by row from the top left.

    Raises:
        ValueError: if `patch_size` does not divide the picture's side.
    """
    side = scene.image.width
    if not is_whole(patch_size) or patch_size < 1 or side % patch_size:
        raise ValueError(f"patch_size is {patch_size}; allowed are the whole divisors of the picture's side, {side}")
    starts = np.arange(0, side, patch_size)
    boxes = np.array([item.box for item in scene.objects])
    across = np.minimum(boxes[:, 2:3], starts + patch_size) - np.maximum(boxes[:, 0:1], starts)
    down = np.minimum(boxes[:, 3:4], starts + patch_size) - np.maximum(boxes[:, 1:2], starts)
    covered = (down.clip(0)[:, :, None] * across.clip(0)[:, None, :]).reshape(len(boxes), -1)
    owner = np.where(covered.max(axis=0) >= _PATCH_COVERAGE * patch_size**2, covered.argmax(axis=0), len(boxes))
    digits = np.array([item.digit for item in scene.objects] + [BACKGROUND_DIGIT])
    colours = np.array([COLOURS.index(item.colour) for item in scene.objects] + [BACKGROUND_COLOUR])
    return digits[owner], colours[owner]
