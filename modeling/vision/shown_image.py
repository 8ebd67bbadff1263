"""What was kept of an image, drawn on it.

Which part of an image a unit shows is for the processor to say, which resizes, crops and tiles, and what it returns
does not tell in most families. So it is measured: an image in which every pixel says where it stands goes through the
same processor, and where a unit lies is read off its pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import ProcessorMixin, image_utils
from transformers.image_utils import ImageInput

from ..budget.selection import Selection
from ..processing_adavtp import inputs_of_questions, readable_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_utils import PIL

_SHADES = 256
# Of what is dropped, of 255.
_DROPPED = 46
# Two even images, neither of them black: a tile that is 0 everywhere fills up prompts in some families.
_DARK, _LIGHT = 64, 192


class Place(NamedTuple):
    """A rectangle of an image, in shares of its width and height."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Place(0.0, 0.0, 1.0, 1.0)


@dataclass
class ShownImage:
    """
    An image as a prompt shows it.

    Attributes:
        image: RGB, without margins that no unit shows.
        places: where on it each of its units lies, in the order of a selection's.
    """

    image: "PIL.Image.Image"
    places: list[Place]

    @property
    def panels(self) -> list[list[int]]:
        """The units of each panel of a picture: all tiles together, and every view of the whole by itself."""
        tiles = [unit for unit, place in enumerate(self.places) if place != WHOLE]
        views = [[unit] for unit, place in enumerate(self.places) if place == WHOLE]
        return [tiles, *views] if tiles else views

    def drawn(
        self, shares: Sequence[torch.Tensor], least_height: int = 1, most_height: int | None = None
    ) -> "PIL.Image.Image":
        """
        The image with its dropped patches dark; where it came in several panels, the others half as large beside it.

        Args:
            shares: of each unit `[rows, columns]` in [0, 1]: 0 is dropped and dark, 1 is as it was. See
                [`shares_of_units`].
            least_height, most_height: in pixels. A smaller image is enlarged a whole number of times, a larger one
                made smaller; by default it is not.

        Raises:
            ValueError: if there are not as many units, or a share is not in [0, 1].
        """
        if len(shares) != len(self.places):
            raise ValueError(f"`shares` is of {len(shares)} units, and the image came in {len(self.places)}.")
        for own in shares:
            if not bool(((own >= 0) & (own <= 1)).all()):
                raise ValueError(f"`shares` has values from {own.min():g} to {own.max():g}; allowed are 0 to 1.")
        image = self._sized(least_height, most_height)
        first, *others = self.panels
        picture = self._darkened(image, first, shares)
        if not others:
            return picture
        small = image.resize([max(1, side // 2) for side in image.size])
        gap = max(1, image.width // 32)
        height = max(image.height, len(others) * (small.height + gap) - gap)
        page = image_utils.PIL.Image.new("RGB", (image.width + gap + small.width, height), "white")
        page.paste(picture, (0, 0))
        for number, units in enumerate(others):
            page.paste(self._darkened(small, units, shares), (image.width + gap, number * (small.height + gap)))
        return page

    def _sized(self, least_height: int, most_height: int | None) -> "PIL.Image.Image":
        image = self.image
        if most_height is not None and image.height > most_height:
            image = image.resize((max(1, image.width * most_height // image.height), most_height))
        times = -(-least_height // image.height)
        return image.resize((image.width * times, image.height * times), image_utils.PIL.Image.Resampling.NEAREST)

    def _darkened(
        self, image: "PIL.Image.Image", units: Sequence[int], shares: Sequence[torch.Tensor]
    ) -> "PIL.Image.Image":
        # What no unit shows was not seen either.
        brightness = image_utils.PIL.Image.new("L", image.size, _DROPPED)
        for unit in units:
            rows, columns = shares[unit].shape
            values = (_DROPPED + (255 - _DROPPED) * shares[unit].float()).round().flatten().int().tolist()
            box = _pixels(self.places[unit], image.size)
            size = max(1, box[2] - box[0]), max(1, box[3] - box[1])
            grid = image_utils.PIL.Image.frombytes("L", (columns, rows), bytes(values))
            brightness.paste(grid.resize(size, image_utils.PIL.Image.Resampling.NEAREST), box[:2])
        return image_utils.PIL.Image.composite(image, image_utils.PIL.Image.new("RGB", image.size), brightness)


def shares_of_units(selection: Selection, num_layers: int) -> list[torch.Tensor]:
    """
    How bright a picture shows each token: the share of decoder layers that see it, of each unit `[rows, columns]`.
    0 or 1 unless a reducer acts inside the decoder.

    Where tokens were merged, these are the places at which one stands; what went into it is not shown.
    """
    shares = selection.keep.float() if selection.depth is None else selection.depth.float() / num_layers
    return [
        own[: rows * columns].cpu().reshape(rows, columns)
        for own, (rows, columns) in zip(shares, selection.grids, strict=True)
    ]


def shown_images(
    model: "PreTrainedModel",
    processor: ProcessorMixin,
    images: Sequence[ImageInput],
    prompt: str | list[dict[str, Any]],
) -> list[ShownImage]:
    """
    The images of a prompt with where on them each unit lies, as a processor cuts and resizes them.

    Args:
        model: of any family.
        processor: its own.
        images: of the prompt, in order.
        prompt: see [`inputs_of_questions`].

    Raises:
        ValueError: see [`inputs_of_questions`].
    """
    images = [_as_pil(image) for image in readable_images(images)]
    made = (
        _pictures_of_units(model, processor, versions, prompt)
        for versions in (
            [_marked(image.size, number / len(images)) for number, image in enumerate(images)],
            [image_utils.PIL.Image.new("RGB", image.size, (_DARK,) * 3) for image in images],
            [image_utils.PIL.Image.new("RGB", image.size, (_LIGHT,) * 3) for image in images],
        )
    )
    places: list[list[Place]] = [[] for _ in images]
    for marked, dark, light in zip(*made, strict=True):
        # What the processor did to colours is undone; what fills up a unit has no colour in any, and is nan.
        values = (_DARK + (_LIGHT - _DARK) * (marked - dark) / (light - dark) + 0.5) / _SHADES
        number = int(values[2].nanmedian() * len(images))
        width, height = images[number].size
        left, right = _ends(values[0].nanmean(dim=0), width)
        top, bottom = _ends(values[1].nanmean(dim=1), height)
        places[number].append(Place(left, top, right, bottom))
    return [_without_margins(*pair) for pair in zip(images, places, strict=True)]


def _as_pil(image: Any) -> "PIL.Image.Image":
    if isinstance(image, image_utils.PIL.Image.Image):
        return image
    pixels = image if image.shape[-1] == 3 else image.transpose(1, 2, 0)
    return image_utils.PIL.Image.fromarray(pixels.astype("uint8"))


def _marked(size: tuple[int, int], number: float) -> "PIL.Image.Image":
    """An image whose red says how far right, whose green how far down a pixel is, and whose blue a share `number`."""
    ramps = [bytes(_SHADES * (2 * pixel + 1) // (2 * length) for pixel in range(length)) for length in size]
    lines = (
        image_utils.PIL.Image.frombytes("L", (size[0], 1), ramps[0]),
        image_utils.PIL.Image.frombytes("L", (1, size[1]), ramps[1]),
    )
    red, green = (line.resize(size, image_utils.PIL.Image.Resampling.NEAREST) for line in lines)
    # Between two numbers, so that rounding does not make it another.
    return image_utils.PIL.Image.merge(
        "RGB", [red, green, image_utils.PIL.Image.new("L", size, int(_SHADES * number) + 1)]
    )


def _pictures_of_units(
    model: "PreTrainedModel",
    processor: ProcessorMixin,
    images: "list[PIL.Image.Image]",
    prompt: str | list[dict[str, Any]],
) -> list[torch.Tensor]:
    """What the model gets of each unit, `[channels, height, width]`, as far as whole patches cover it."""
    inputs = inputs_of_questions(processor, [images], [prompt])
    patch = getattr(model.config.vision_config, "patch_size", 1)
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    pictures = model.prompt_reader.family.pictures(model, inputs)
    return [
        own[..., : own.shape[-2] // rows * rows, : own.shape[-1] // columns * columns].double() for own in pictures
    ]


def _ends(values: torch.Tensor, num_pixels: int) -> tuple[float, float]:
    """
    Where a line of pixels begins and ends on an image that has `num_pixels` in its direction, by where each of them
    stands, nan where it is none of the image's.
    """
    places = torch.arange(len(values)) + 0.5
    # An image that is enlarged ends on each side in a repeated pixel.
    is_inner = (values > 1 / num_pixels) & (values < 1 - 1 / num_pixels)
    if int(is_inner.sum()) < 2:
        return 0.0, 1.0
    places, values = places[is_inner].double(), values[is_inner]
    step = ((places - places.mean()) * (values - values.mean())).sum() / (places - places.mean()).square().sum()
    begin = float(values.mean() - step * places.mean())
    ends = begin, begin + float(step) * len(is_inner)
    # Where a unit is filled up, its image ends within it.
    return max(ends[0], 0.0), min(ends[1], 1.0)


def _without_margins(image: "PIL.Image.Image", places: list[Place]) -> ShownImage:
    """What units show of an image. Ends that are closer than a colour tells apart are one."""
    ends = [_joined([end for place in places for end in place[axis::2]]) for axis in (0, 1)]
    joined = [[ends[number % 2][end] for number, end in enumerate(place)] for place in places]
    low = [min(place[axis] for place in joined) for axis in (0, 1)]
    high = [max(place[axis + 2] for place in joined) for axis in (0, 1)]
    cut = image.crop(_pixels(Place(*low, *high), image.size))
    within = [[(end - low[n % 2]) / (high[n % 2] - low[n % 2]) for n, end in enumerate(place)] for place in joined]
    return ShownImage(cut, [Place(*place) for place in within])


def _joined(ends: list[float]) -> dict[float, float]:
    """For each of these numbers what it is taken for."""
    groups: list[list[float]] = []
    for end in sorted({0.0, 1.0, *ends}):
        if groups and end - groups[-1][-1] < 1 / _SHADES:
            groups[-1].append(end)
        else:
            groups.append([end])
    taken = {}
    for group in groups:
        border = {0.0, 1.0}.intersection(group)
        taken |= dict.fromkeys(group, border.pop() if border else sum(group) / len(group))
    return taken


def _pixels(place: Place, size: tuple[int, int]) -> tuple[int, int, int, int]:
    return tuple(round(share * size[number % 2]) for number, share in enumerate(place))
