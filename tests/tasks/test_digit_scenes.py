"""What digit scenes promise: pictures that can be read, answers that follow from them, and splits that stay apart."""

import doctest
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sklearn.datasets import load_digits

from adavtp.tasks import digit_scenes
from adavtp.tasks.digit_scenes import (
    BACKGROUND_COLOUR,
    BACKGROUND_DIGIT,
    COLOUR_VALUES,
    COLOURS,
    QUESTION_KINDS,
    SPLITS,
    VOCABULARY,
    Scene,
    SceneObject,
    ask_questions,
    caption,
    digit_instances,
    draw_scene,
    load_digit_questions,
    load_digit_scenes,
    patch_labels,
)

NUM_SCENES = 300


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene("train", index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digit_scenes")


@pytest.fixture(scope="module")
def scene_rows(cache_dir: Path) -> Dataset:
    return load_digit_scenes("train", 200, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def question_rows(cache_dir: Path) -> Dataset:
    return load_digit_questions("test", 240, cache_dir=cache_dir)


def answer_from_objects(question: str, objects: list[dict]) -> str:
    """Answer a question by reading its words, without the code that asked it."""
    words = question.removesuffix(" ?").split()
    by_name = {str(item["digit"]): item for item in objects} | {item["colour"]: item for item in objects}
    largest = max(objects, key=lambda item: max(item["box"][2] - item["box"][0], item["box"][3] - item["box"][1]))
    if question == "how many digits are there ?":
        return str(len(objects))
    if question == "which digit is the largest ?":
        return str(largest["digit"])
    if question == "what colour is the largest digit ?":
        return largest["colour"]
    if question.startswith("what colour is the "):
        return by_name[words[-1]]["colour"]
    if question.startswith("which digit is "):
        return str(by_name[words[-1]]["digit"])
    if question.startswith("is there a "):
        return "yes" if words[-1] in by_name else "no"
    first, second = [by_name[word] for word in words if word in by_name]
    axis = 0 if "left of" in question else 1
    distance = (second["box"][axis] + second["box"][axis + 2] - first["box"][axis] - first["box"][axis + 2]) / 2
    assert abs(distance) >= 8, "the two digits are too close together to tell"
    return "yes" if distance > 0 else "no"


def describe(scene: Scene) -> list[dict]:
    return [{"digit": item.digit, "colour": item.colour, "box": item.box} for item in scene.objects]


# Splits and repeatability


def test_no_handwriting_crosses_splits() -> None:
    pools = [number for split in SPLITS for pool in digit_instances(split) for number in pool]
    assert sorted(pools) == list(range(1797))


@pytest.mark.parametrize(("split", "share"), [("train", 0.7), ("validation", 0.1), ("test", 0.2)])
def test_every_digit_value_is_divided_in_the_same_shares(split: str, share: float) -> None:
    values = load_digits().target
    for digit, pool in enumerate(digit_instances(split)):
        assert set(values[list(pool)]) == {digit}
        assert len(pool) / np.sum(values == digit) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_show_only_the_handwriting_of_their_split_whatever_the_seed(split: str) -> None:
    for seed in (0, 7):
        for index in range(20):
            for item in draw_scene(split, index, seed).objects:
                assert item.instance in digit_instances(split)[item.digit]


def test_a_scene_can_be_drawn_again_alone(scenes: list[Scene]) -> None:
    again = draw_scene("train", 17)
    assert again.objects == scenes[17].objects
    assert again.image.tobytes() == scenes[17].image.tobytes()
    assert again.index == 17


def test_split_seed_and_index_each_change_the_scene() -> None:
    drawn = [draw_scene("train", 3), draw_scene("test", 3), draw_scene("train", 3, seed=1), draw_scene("train", 4)]
    assert len({scene.image.tobytes() for scene in drawn}) == 4


def test_the_first_scenes_of_a_larger_set_are_the_smaller_set(scene_rows: Dataset, cache_dir: Path) -> None:
    smaller = load_digit_scenes("train", 12, cache_dir=cache_dir)
    assert smaller.remove_columns("image")[:] == scene_rows.remove_columns("image")[:12]
    for small, large in zip(smaller["image"], scene_rows.select(range(12))["image"], strict=True):
        assert small.tobytes() == large.tobytes()


def test_every_argument_leads_to_another_data_set(cache_dir: Path) -> None:
    variants = [
        load_digit_scenes("test", 2, cache_dir=cache_dir),
        load_digit_scenes("validation", 2, cache_dir=cache_dir),
        load_digit_scenes("test", 3, cache_dir=cache_dir),
        load_digit_scenes("test", 2, seed=1, cache_dir=cache_dir),
        load_digit_scenes("test", 2, image_size=104, cache_dir=cache_dir),
        load_digit_questions("test", 2, cache_dir=cache_dir),
    ]
    assert len({variant.cache_files[0]["filename"] for variant in variants}) == len(variants)
    again = load_digit_scenes("test", 2, cache_dir=cache_dir)
    assert again.cache_files == variants[0].cache_files, "the cache was not used"


# Pictures


def test_a_scene_has_two_to_six_digits_of_distinct_values_and_colours(scenes: list[Scene]) -> None:
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4, 5, 6}
    for scene in scenes:
        assert len({item.digit for item in scene.objects}) == len(scene.objects)
        assert len({item.colour for item in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize("image_size", [96, 120, 168])
def test_digits_lie_apart_within_the_picture_and_one_is_clearly_the_largest(image_size: int) -> None:
    for index in range(60):
        scene = draw_scene("train", index, image_size=image_size)
        assert scene.image.mode == "RGB" and scene.image.size == (image_size, image_size)
        taken = np.zeros((image_size, image_size), dtype=int)
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= image_size and 0 <= top < bottom <= image_size
            # One pixel of margin on each side shows the gap.
            taken[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] += 1
        assert taken.max() == 1
        sides = sorted(item.side for item in scene.objects)
        assert sides[-1] >= 1.2 * sides[-2]


def test_digits_have_sizes_that_a_small_patch_can_show_and_cover_little_of_the_picture(scenes: list[Scene]) -> None:
    sides = [item.side for scene in scenes for item in scene.objects]
    assert min(sides) >= 14 and max(sides) <= 30
    covered = [np.mean(patch_labels(scene, 8)[0] != BACKGROUND_DIGIT) for scene in scenes]
    assert np.mean(covered) <= 0.25


def test_the_ink_inside_a_box_has_the_named_colour(scenes: list[Scene]) -> None:
    values = np.array(list(COLOUR_VALUES.values()), dtype=float)
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=float)
        for item in scene.objects:
            left, top, right, bottom = item.box
            region = pixels[top:bottom, left:right].reshape(-1, 3)
            distances = np.linalg.norm(region[:, None] - values, axis=2)
            ink = distances.min(axis=1) < 30
            assert ink.sum() >= 10
            shares = np.bincount(distances.argmin(axis=1)[ink], minlength=len(COLOURS)) / ink.sum()
            assert COLOURS[shares.argmax()] == item.colour
            assert shares.max() > 0.9


def test_the_background_never_resembles_a_digit_colour(scenes: list[Scene]) -> None:
    values = np.array(list(COLOUR_VALUES.values()), dtype=float)
    for scene in scenes[:60]:
        pixels = np.asarray(scene.image, dtype=float)
        background = np.ones(pixels.shape[:2], dtype=bool)
        for item in scene.objects:
            left, top, right, bottom = item.box
            background[top:bottom, left:right] = False
        rest = pixels[background]
        assert rest.max() < 130
        assert np.max(rest.max(axis=1) - rest.min(axis=1)) < 50
        assert np.linalg.norm(rest[:, None] - values, axis=2).min() > 100


# Questions


def test_every_answer_follows_from_the_objects(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    for scene in scenes:
        for item in ask_questions(scene, rng, QUESTION_KINDS * 3):
            assert item.answer == answer_from_objects(item.question, describe(scene)), item


def test_relation_questions_stay_decidable_in_a_larger_picture() -> None:
    rng = np.random.default_rng(1)
    for index in range(40):
        scene = draw_scene("train", index, image_size=168)
        (item,) = ask_questions(scene, rng, ["relation"])
        assert item.answer == answer_from_objects(item.question, describe(scene))


def test_one_question_is_asked_per_requested_kind(scenes: list[Scene]) -> None:
    kinds = ["largest", "count", "largest"]
    asked = ask_questions(scenes[0], np.random.default_rng(0), kinds)
    assert [item.kind for item in asked] == kinds
    assert asked[0].question != asked[2].question


@pytest.mark.parametrize("kind", ["existence", "relation"])
def test_yes_and_no_are_balanced(scenes: list[Scene], kind: str) -> None:
    rng = np.random.default_rng(2)
    answers = [item.answer for scene in scenes for _ in range(4) for item in ask_questions(scene, rng, [kind])]
    assert np.mean([answer == "yes" for answer in answers]) == pytest.approx(0.5, abs=0.05)


def test_every_form_of_a_question_is_asked(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    text = "\n".join(item.question for scene in scenes[:60] for item in ask_questions(scene, rng))
    for part in ("digit left of", "digit above", "1 left of", "1 above", "the largest ?", "the largest digit ?"):
        assert part in text


def test_the_majority_answer_is_below_35_percent(scene_rows: Dataset, question_rows: Dataset) -> None:
    for answers in ([answer for row in scene_rows["answers"] for answer in row], list(question_rows["answer"])):
        assert Counter(answers).most_common(1)[0][1] <= 0.35 * len(answers)


def test_the_vocabulary_is_exactly_what_is_said(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    said = set()
    for scene in scenes:
        said.update(caption(scene).split(" "))
        for item in ask_questions(scene, rng, QUESTION_KINDS * 2):
            assert " " not in item.answer
            said.update(item.question.split(" "), [item.answer])
    assert said == set(VOCABULARY)
    assert list(VOCABULARY) == sorted(VOCABULARY)


def test_a_caption_reads_from_left_to_right(scenes: list[Scene]) -> None:
    for scene in scenes[:30]:
        names = caption(scene).split(" , ")
        centres = {f"{item.colour} {item.digit}": item.centre[0] for item in scene.objects}
        assert len(names) == len(centres)
        assert [centres[name] for name in names] == sorted(centres.values())


# Patch labels


@pytest.mark.parametrize("patch_size", [8, 12])
def test_patch_labels_name_the_digit_that_covers_the_patch_most(scenes: list[Scene], patch_size: int) -> None:
    side = 96 // patch_size
    for scene in scenes[:20]:
        digits, colours = patch_labels(scene, patch_size)
        assert digits.shape == colours.shape == (side * side,)
        for patch in range(side * side):
            row, column = divmod(patch, side)
            counts = dict.fromkeys(scene.objects, 0)
            for item in scene.objects:
                canvas = np.zeros((96, 96), dtype=int)
                canvas[item.box[1] : item.box[3], item.box[0] : item.box[2]] = 1
                window = canvas[row * patch_size :, column * patch_size :][:patch_size, :patch_size]
                counts[item] = int(window.sum())
            best = max(counts, key=counts.__getitem__)
            if counts[best] < 0.2 * patch_size**2:
                assert (digits[patch], colours[patch]) == (BACKGROUND_DIGIT, BACKGROUND_COLOUR)
            else:
                labelled = next(item for item in counts if item.digit == digits[patch])
                assert counts[labelled] == counts[best]
                assert COLOURS[colours[patch]] == labelled.colour


def test_patch_labels_show_every_digit(scenes: list[Scene]) -> None:
    for scene in scenes:
        digits, colours = patch_labels(scene, 8)
        assert set(digits) - {BACKGROUND_DIGIT} == {item.digit for item in scene.objects}
        assert {COLOURS[number] for number in set(colours) - {BACKGROUND_COLOUR}} == {
            item.colour for item in scene.objects
        }


# Data sets


def test_a_scene_row_holds_what_the_scene_holds(scene_rows: Dataset, scenes: list[Scene]) -> None:
    assert len(scene_rows) == 200
    for row, scene in zip(scene_rows.select(range(20)), scenes, strict=False):
        assert row["image"].format == "PNG"
        assert row["image"].tobytes() == scene.image.tobytes()
        assert row["caption"] == caption(scene)
        assert row["objects"] == [item | {"box": list(item["box"])} for item in describe(scene)]
        digits, colours = patch_labels(scene, 8)
        assert row["patch_digits"] == digits.tolist()
        assert row["patch_colours"] == colours.tolist()


def test_a_scene_row_asks_eight_different_questions_of_all_kinds(scene_rows: Dataset) -> None:
    for row in scene_rows.remove_columns("image"):
        assert len(set(row["questions"])) == len(row["answers"]) == len(row["kinds"]) == 8
        assert row["kinds"][:6] == list(QUESTION_KINDS)
        assert set(row["kinds"]) == set(QUESTION_KINDS)
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            assert answer == answer_from_objects(question, row["objects"])


def test_a_question_row_is_a_conversation_about_one_picture(question_rows: Dataset) -> None:
    for row in question_rows.select(range(12)):
        assert [image.size for image in row["images"]] == [(96, 96)]
        assert row["messages"] == [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}, {"type": "text", "text": row["question"]}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ]


def test_question_rows_cycle_through_the_kinds_each_with_a_picture_that_answers_it(question_rows: Dataset) -> None:
    assert list(question_rows["kind"]) == list(QUESTION_KINDS) * 40
    for index, row in enumerate(question_rows.select(range(30))):
        scene = draw_scene("test", index)
        assert row["images"][0].tobytes() == scene.image.tobytes()
        assert row["answer"] == answer_from_objects(row["question"], describe(scene))


# Errors and documentation


LOADERS = (load_digit_scenes, load_digit_questions, draw_scene)
SIZES = "image_size is .* allowed are multiples of 8 from 96 to 168"


@pytest.mark.parametrize(
    ("message", "call"),
    [
        *(("split is 'dev'; allowed are train, validation, test", partial(load, "dev", 1)) for load in LOADERS),
        *((SIZES, partial(load, "train", 1, image_size=100)) for load in LOADERS),
        *((SIZES, partial(draw_scene, "train", 1, image_size=size)) for size in (88, 176, 96.0, "96", True)),
        *((f"num_scenes is {n}; .* from 1", partial(load_digit_scenes, "train", n)) for n in (0, -3, 2.5, None)),
        ("num_questions is 0; allowed are whole numbers from 1", partial(load_digit_questions, "train", 0)),
        ("seed is -1; allowed are whole numbers from 0", partial(draw_scene, "train", 0, seed=-1)),
        ("index is -1; allowed are whole numbers from 0", partial(draw_scene, "train", -1)),
        *(("kinds contains 'shape'; allowed", partial(load, "train", 1, kinds=["shape"])) for load in LOADERS[:2]),
    ],
)
def test_what_cannot_be_drawn_or_asked_is_refused_by_name(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_kinds_and_patch_sizes_that_do_not_fit_a_scene_are_refused(scenes: list[Scene]) -> None:
    with pytest.raises(ValueError, match="kinds contains 'shape'; allowed are colour_of_digit"):
        ask_questions(scenes[0], np.random.default_rng(0), ["shape"])
    for patch_size in (0, 7, -8, 8.0):
        with pytest.raises(ValueError, match="patch_size is .* divisors of the picture's side, 96"):
            patch_labels(scenes[0], patch_size)


def test_the_example_in_the_module_docstring_holds() -> None:
    results = doctest.testmod(digit_scenes)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    ("kind", "form", "name_of"),
    [
        ("position", "how {} is the {} ?", lambda item: str(item.digit)),
        ("position_of_colour", "how {} is the {} digit ?", lambda item: item.colour),
    ],
)
def test_a_question_of_training_asks_for_a_digit_s_place_in_tenths(
    kind: str, form: str, name_of: Callable[[SceneObject], str]
) -> None:
    for index in range(20):
        scene = draw_scene("train", index)
        middles = {name_of(item): [sum(item.box[axis::2]) / 2 for axis in (0, 1)] for item in scene.objects}
        for question in ask_questions(scene, np.random.default_rng(index), [kind] * 4):
            _, direction, _, _, name, *_ = question.question.split()
            assert question.question == form.format(direction, name)
            middle = middles[name][("left", "above").index(direction)]
            assert question.answer == str(int(middle / scene.image.width * 10))


def test_rows_are_asked_the_kinds_that_are_named(cache_dir: Path) -> None:
    kinds = ["relation", "position", "relation"]
    scenes = load_digit_scenes("validation", 3, kinds=kinds, cache_dir=cache_dir)
    assert all(row["kinds"] == kinds for row in scenes)
    questions = load_digit_questions("validation", 5, kinds=["relation", "position_of_colour"], cache_dir=cache_dir)
    assert questions["kind"] == ["relation", "position_of_colour", "relation", "position_of_colour", "relation"]
