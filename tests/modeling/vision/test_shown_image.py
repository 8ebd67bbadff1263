"""What was kept is drawn where it is on the image, however a family's processor cuts and resizes it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from adavtp.modeling.budget.selection import Selection
from adavtp.modeling.families.encoded import units_of_kinds
from adavtp.modeling.processing_adavtp import inputs_of_questions
from adavtp.modeling.vision.shown_image import WHOLE, Place, ShownImage, shares_of_units, shown_images
from tiny_conversations import digit_model, llava_processor
from tiny_families import BOS, FAMILIES, IMAGE, with_budget
from tiny_processors import family_model, family_processor

# Adapter and image processor are another's.
_PACKED_AS_ANOTHER = ("paligemma2", "qwen3_5", "smolvlm")
QUESTION = "which digit is red ?"
# Without torchvision its processor is not made, of which no part but this one looks at images.
PIXTRAL = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})


class PixtralAlone:
    """A processor of nothing but Mistral 3's images, whose prompt is their placeholders, one for 8 x 8 pixels."""

    def of_questions(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> BatchFeature:
        (images,) = images
        made = PIXTRAL(images, return_tensors="pt")
        ids = [BOS, *[IMAGE] * (made["image_sizes"].prod() // 64), 7]
        return BatchFeature({"input_ids": torch.tensor([ids]), **made})


def model_and_processor(name: str) -> tuple[Any, Any]:
    """A model in whose tower no patch sees another, so that a token tells nothing but what it is made of."""
    if name == "mistral3":
        model, processor = with_budget(name), PixtralAlone()
    else:
        processor = family_processor(name)
        model = family_model(name, processor).double().eval()
        for parameter in model.parameters():
            # Gemma 3's projector begins with nothing.
            if parameter.dim() == 2 and not parameter.any():
                torch.nn.init.normal_(parameter)
    for module in model.family.tower(model).modules():
        if type(module).__name__.endswith("Attention"):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    return model, processor


@torch.no_grad()
def selection_of_changed(model: Any, processor: Any, image: Image.Image, plain: Image.Image) -> Selection:
    """The tokens that differ between two images of one size, found by running the model's encoder on both."""
    made = []
    for shown in (image, plain):
        inputs = inputs_of_questions(processor, [[shown]], [QUESTION])
        inputs["pixel_values"] = inputs["pixel_values"].double()
        output = model.encoded("image", inputs)
        made.append(torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output]))
    found = model.family.units(model, "image", output, inputs)
    units = units_of_kinds(model.family.kinds(model.config, inputs["input_ids"]), {"image": found})
    change, is_token = (made[0] - made[1]).abs().amax(dim=-1), units.token >= 0
    of_token = torch.zeros(int(units.sizes.sum()), dtype=change.dtype).index_copy(
        0, units.token[is_token], change[is_token]
    )
    in_units = torch.zeros(units.is_token.shape, dtype=change.dtype).masked_scatter(units.is_token, of_token)
    # Resizing lets a colour run over into cells beside it, a little.
    selection = Selection.from_keep(in_units > 0.2 * change.max())
    selection.sizes, selection.grids = units.sizes, units.grids
    return selection


def bright_part(picture: Image.Image) -> tuple[int, int, int, int]:
    """The box around what is not dark in a picture of a white image."""
    return picture.convert("L").point(lambda value: 255 * (value > 100)).getbbox()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in _PACKED_AS_ANOTHER])
def test_the_patch_that_a_model_sees_changed_is_bright_where_the_image_was_changed(name: str) -> None:
    model, processor = model_and_processor(name)
    # No processor leaves this size as it is, and those that make tiles make several.
    width, height = size = (100, 60)
    plain = Image.new("RGB", size, "white")
    (shown,) = shown_images(model, processor, [plain], QUESTION)
    assert shown.image.size == size
    assert len(shown.panels) == (2 if {"tile", "view"} & set(model.family.unit_names) else 1)
    for across, down in ((22, 18), (63, 49)):
        image = plain.copy()
        image.paste((0, 0, 160), (across - 2, down - 2, across + 3, down + 3))
        selection = selection_of_changed(model, processor, image, plain)
        shares = shares_of_units(selection, 1)
        picture = shown.drawn(shares)
        # The view of the whole stands beside, half as large.
        for begin, scale, units in zip((0, width + 3), (1, 2), shown.panels, strict=False):
            right = begin + width // scale
            left, top, right, bottom = bright_part(picture.crop((begin, 0, right, height // scale)))
            assert left * scale <= across < right * scale and top * scale <= down < bottom * scale
            place, (rows, columns) = shown.places[units[0]], selection.grids[units[0]]
            cell = (place.right - place.left) * width / columns, (place.bottom - place.top) * height / rows
            assert (right - left) * scale <= 2 * cell[0] + 3 and (bottom - top) * scale <= 2 * cell[1] + 3


def test_tiles_lie_row_by_row_and_a_margin_that_is_cut_off_is_not_drawn() -> None:
    # Of three by two tiles and a view.
    processor = family_processor("internvl")
    processor.image_processor.max_patches = 6
    model = family_model("internvl", processor)
    shown = shown_images(model, processor, [Image.new("RGB", (300, 200)), Image.new("RGB", (40, 160))], QUESTION)
    thirds, halves = (0, 1 / 3, 2 / 3, 1), (0, 0.5, 1)
    tiles = [(thirds[n % 3], halves[n // 3], thirds[n % 3 + 1], halves[n // 3 + 1]) for n in range(6)]
    np.testing.assert_allclose(shown[0].places[:-1], tiles, atol=2e-3)
    np.testing.assert_allclose(shown[1].places[:-1], [(0, n / 4, 1, (n + 1) / 4) for n in range(4)], atol=2e-3)
    assert [one.places[-1] for one in shown] == [WHOLE] * 2
    assert [one.panels for one in shown] == [[[0, 1, 2, 3, 4, 5], [6]], [[0, 1, 2, 3], [4]]]


def test_of_an_image_that_is_cropped_only_the_square_is_drawn() -> None:
    processor = llava_processor()
    model = digit_model(processor).eval()
    image = Image.new("RGB", (90, 30), "white")
    image.paste((0, 0, 255), (30, 0, 60, 30))
    (shown,) = shown_images(model, processor, [image], "is it red ?")
    assert shown.image.size == (30, 30) and shown.places == [WHOLE]
    assert set(shown.image.getdata()) == {(0, 0, 255)}
    inputs = processor.of_questions(image, "is it red ?")
    selection = model.select_tokens(**inputs, token_budget=0.5, reducer="grid")
    model.processor = processor
    drawn = model.picture_of_kept(image, "is it red ?", selection, least_height=50)
    rows, columns = selection.grids[0]
    assert drawn.size == (60, 60)
    blue = np.asarray(drawn.resize((columns, rows), Image.Resampling.BOX))[..., 2]
    assert np.array_equal(blue > 200, selection.keep[0].reshape(rows, columns).numpy())
    with pytest.raises(ValueError, match="`shares` is of 2 units"):
        shown.drawn([torch.ones(2, 2)] * 2)


def test_the_more_layers_see_a_patch_the_brighter_it_is() -> None:
    depth = torch.tensor([[4, 2, 0, 4] * 4])
    selection = Selection(depth > 0, torch.arange(16)[None], depth=depth, grids=[(4, 4)])
    (shares,) = shares_of_units(selection, 4)
    assert shares.tolist() == [[1.0, 0.5, 0.0, 1.0]] * 4
    shown = ShownImage(Image.new("RGB", (32, 32), "white"), [WHOLE])
    drawn = np.asarray(shown.drawn([shares]))[4::8, 4::8, 0]
    assert drawn.flatten().tolist() == [255, 150, 46, 255] * 4
    for value in (2.0, -0.5):
        with pytest.raises(ValueError, match="`shares` has values"):
            shown.drawn([torch.full((4, 4), value)])


def test_what_no_tile_shows_is_dark_and_every_view_of_the_whole_stands_beside() -> None:
    places = [WHOLE, Place(0.0, 0.0, 0.5, 1.0), WHOLE]
    shown = ShownImage(Image.new("RGB", (64, 32), "white"), places)
    drawn = np.asarray(shown.drawn([torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1)]))[..., 0]
    assert drawn.shape == (34, 64 + 2 + 32)
    assert (drawn[:32, :32] == 255).all() and (drawn[:32, 32:64] == 46).all()
    assert (drawn[:16, 66:] == 255).all() and (drawn[18:, 66:] == 46).all()
