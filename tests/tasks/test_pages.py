"""What pages promise: text that can be read, answers that follow from it, and splits that stay apart."""

import doctest
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from adavtp.tasks import pages
from adavtp.tasks.pages import (
    FORMS,
    GLYPHS,
    PATCH_LABELS,
    PATCH_ROLES,
    PATCH_WORDS,
    QUESTION_KINDS,
    Page,
    ask_questions,
    draw_page,
    kinds_of_page,
    load_page_questions,
    load_pages,
    patch_labels,
    split_of_pair,
)
from adavtp.tasks.pages.page import BLANK, CELL, NUM_CELLS
from adavtp.tasks.pages.processor import build_page_processor
from adavtp.tasks.pages.typefaces import FACES, glyph_masks
from adavtp.tasks.splits import SPLITS


@pytest.fixture(scope="module")
def drawn() -> list[Page]:
    return [draw_page("train", index) for index in range(150)]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def question_rows(cache_dir: Path) -> Dataset:
    return load_page_questions("test", 120, cache_dir=cache_dir)


def lines_of(page: Page) -> list[list[str]]:
    return [page.line(row).split() for row in range(NUM_CELLS)]


def keys_of(words: list[str]) -> list[str]:
    return [word for word in words if word.isupper()]


def values_of(words: list[str]) -> list[str]:
    return [word for word in words if word.isdigit()]


def answer_from_text(page: Page, question: str) -> str:
    """Answer a question by reading the page's lines, without the code that asked it."""
    lines = lines_of(page)
    named = re.findall(r"\b[A-Z]{2}\b", question)
    rows = [words for words in lines if keys_of(words) and values_of(words)]
    own = next((words for words in rows if named and named[0] in words), None)
    if question.startswith("what is the value of"):
        return values_of(own)[0]
    if question.startswith("which key has the value"):
        value = re.findall(r"\d\d", question)[0]
        return next(keys_of(words)[0] for words in rows if value in words)
    if question.startswith("what is in row"):
        head = next(words for words in lines if named[1] in words and not values_of(words))
        return values_of(own)[keys_of(head).index(named[1])]
    if question.startswith("which is larger"):
        return max(named, key=lambda key: next(values_of(words)[0] for words in rows if key in words))
    if question.startswith("which key is below"):
        return keys_of(rows[rows.index(own) + 1])[0]
    if question.startswith("how many"):
        return str(len(rows))
    if question.startswith("read the line of"):
        return " ".join(own)
    assert question == "read all the entries ."
    return " ".join(word for words in rows for word in keys_of(words) + values_of(words))


# Splits and repeatability


def test_no_typeface_pair_or_margins_cross_splits() -> None:
    faces = [face for split in SPLITS for face in FACES[split]]
    assert len(set(faces)) == len(faces)
    margins = {}
    for split in SPLITS:
        texts = [draw_page(split, index) for index in range(90)]
        for page in texts:
            pairs = [(entry.key, entry.value) for entry in page.entries]
            assert {split_of_pair(*pair) for pair in pairs} == {split}
        # A ledger's keys begin at the left margin, and its values end at the right one unless they stand behind keys.
        ledgers = [page.entries[0] for page in texts if page.form == "ledger"]
        ends = [(entry.key_places[0][1], entry.value_places[-1][1]) for entry in ledgers]
        margins[split] = {(left, right) for left, right in ends if right > left + 4}
    assert not margins["train"] & (margins["test"] | margins["validation"])
    assert len(margins["test"]) >= 3


def test_a_page_can_be_drawn_again_alone(drawn: list[Page]) -> None:
    again = draw_page("train", 17)
    assert again.entries == drawn[17].entries
    assert again.image.tobytes() == drawn[17].image.tobytes()


def test_split_seed_and_index_each_change_the_page() -> None:
    different = [draw_page("train", 3), draw_page("test", 3), draw_page("train", 3, seed=1), draw_page("train", 4)]
    assert len({page.image.tobytes() for page in different}) == 4


def test_the_first_rows_of_a_larger_set_are_the_smaller_set(question_rows: Dataset, cache_dir: Path) -> None:
    smaller = load_page_questions("test", 6, cache_dir=cache_dir)
    assert smaller.remove_columns("images")[:] == question_rows.remove_columns("images")[:6]


def test_every_argument_leads_to_another_data_set(cache_dir: Path) -> None:
    variants = [
        load_pages("test", 2, cache_dir=cache_dir),
        load_pages("validation", 2, cache_dir=cache_dir),
        load_pages("test", 2, seed=1, cache_dir=cache_dir),
        load_pages("test", 2, kinds=["count"], cache_dir=cache_dir),
        load_pages("test", 2, num_questions=3, cache_dir=cache_dir),
        load_pages("test", 2, max_entries=5, cache_dir=cache_dir),
        load_pages("test", 2, text_share=0.0, cache_dir=cache_dir),
        load_pages("test", 2, forms=["table", "ledger"], cache_dir=cache_dir),
        load_page_questions("test", 2, cache_dir=cache_dir),
    ]
    assert len({variant.cache_files[0]["filename"] for variant in variants}) == len(variants)
    assert load_pages("test", 2, cache_dir=cache_dir).cache_files == variants[0].cache_files, "the cache was not used"


# Pages


def test_forms_take_turns_and_are_full_of_text(drawn: list[Page]) -> None:
    assert [page.form for page in drawn[:6]] == [*FORMS, *FORMS]
    ink = [(page.glyphs != BLANK).sum() for page in drawn]
    asked = [
        len({place for entry in page.entries for place in entry.key_places + entry.value_places}) for page in drawn
    ]
    # A third of 576 patches and more has a glyph, and four of five glyphs belong to no entry.
    assert np.mean(ink) > 576 / 3
    assert np.mean(asked) / np.mean(ink) < 0.25


def test_keys_and_values_come_once_on_a_page(drawn: list[Page]) -> None:
    for page in drawn:
        words = Counter(word for words in lines_of(page) for word in words if not word.islower())
        assert set(words.values()) == {1}


@pytest.mark.parametrize("split", SPLITS)
def test_every_glyph_is_printed_in_its_place(split: str) -> None:
    page = draw_page(split, 1)
    grey = np.asarray(page.image, dtype=np.float32).mean(axis=2)
    patches = grey.reshape(NUM_CELLS, CELL, NUM_CELLS, CELL).transpose(0, 2, 1, 3)
    best = np.zeros((NUM_CELLS, NUM_CELLS, len(GLYPHS)))
    for face in FACES[split]:
        masks = -glyph_masks(face).reshape(len(GLYPHS), -1, CELL * CELL)
        masks = masks - masks.mean(axis=-1, keepdims=True)
        masks /= np.linalg.norm(masks, axis=-1, keepdims=True)
        # The last row of pixels may be underlined.
        flat = patches.reshape(NUM_CELLS, NUM_CELLS, -1)
        flat = flat - flat.mean(axis=-1, keepdims=True)
        flat = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
        best = np.maximum(best, np.einsum("rcp,gnp->rcgn", flat, masks).max(axis=-1))
    has_glyph = page.glyphs != BLANK
    assert (best.argmax(axis=-1) == page.glyphs)[has_glyph].mean() > 0.85
    assert best.max(axis=-1)[has_glyph].min() > best.max(axis=-1)[~has_glyph].mean()


def test_labels_of_patches_follow_from_the_lines(drawn: list[Page]) -> None:
    for page in drawn[:30]:
        labels = {name: label.reshape(NUM_CELLS, NUM_CELLS) for name, label in patch_labels(page).items()}
        lines = [(row, keys_of(words)[0]) for row, words in enumerate(lines_of(page)) if values_of(words)]
        for row, words in enumerate(lines_of(page)):
            pieces = [*PATCH_WORDS["patch_glyphs"], "[SPACE]"]
            told = "".join(pieces[label] for label in labels["patch_glyphs"][row])
            assert [word.replace("##", "") for word in told.split("[SPACE]") if word] == words
            assert all(word.count("##") == len(word.replace("##", "")) - 1 for word in told.split("[SPACE]") if word)
            keys, values = keys_of(words), values_of(words)
            told = {name: set(labels[name][row].tolist()) - {PATCH_LABELS[name] - 1} for name in PATCH_LABELS}
            first, second = (
                [{"ABCDEFGHJKLMNPRSTUVWXYZ".index(key[number]) for key in keys} if values else set()]
                for number in (0, 1)
            )
            assert [told["patch_keys_first"]] == first
            assert [told["patch_keys_second"]] == second
            assert told["patch_values_first"] == {int(value[0]) for value in values}
            assert told["patch_values_second"] == {int(value[1]) for value in values}
            if values:
                number = [line for line, _ in lines].index(row)
                below = [key for _, key in lines[number + 1 :]]
                of_line = {
                    name: [PATCH_WORDS[name][label].replace("##", "") for label in told[name]]
                    for name in PATCH_WORDS
                    if PATCH_ROLES[name]
                }
                assert "".join(of_line["patch_lines_first"] + of_line["patch_lines_second"]) == str(number + 1)
                assert "".join(of_line["patch_below_first"] + of_line["patch_below_second"]) == (below or ["."])[0]


def test_a_cell_of_a_table_is_told_its_column_and_the_head_of_a_column_itself() -> None:
    page = draw_page("train", 2, forms=["table"])
    labels = patch_labels(page)
    (head,) = [words for words in lines_of(page) if len(keys_of(words)) >= 2]

    def told(place: tuple[int, int]) -> str:
        index = place[0] * NUM_CELLS + place[1]
        return "".join(
            "ABCDEFGHJKLMNPRSTUVWXYZ"[labels[f"patch_columns_{which}"][index]] for which in ("first", "second")
        )

    for entry in page.entries:
        values = values_of(lines_of(page)[entry.value_places[0][0]])
        column = keys_of(head)[values.index(entry.value)]
        assert {told(place) for place in (*entry.value_places, *entry.column_places)} == {column}


# Questions


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_follow_from_the_text(drawn: list[Page], kind: str) -> None:
    asked = 0
    for page in drawn:
        for question in ask_questions(page, np.random.default_rng(0), kinds_of_page(page, [kind] * 3)):
            assert question.answer == answer_from_text(page, question.question)
            asked += 1
    assert asked > 50


def test_the_places_of_an_answer_are_enough_to_read_it(drawn: list[Page]) -> None:
    for page in drawn:
        for question in ask_questions(page, np.random.default_rng(1), kinds_of_page(page)):
            shown = {GLYPHS[page.glyphs[place]] for place in question.places}
            if question.kind != "count":
                assert set(question.answer.replace(" ", "")) <= shown


def test_long_answers_are_as_long_as_they_are_said_to_be(drawn: list[Page]) -> None:
    lengths = {"read_line": range(8, 21), "read_entries": range(20, 61)}
    for page in drawn:
        for question in ask_questions(page, np.random.default_rng(0), kinds_of_page(page, list(lengths))):
            assert len(question.answer.replace(" ", "")) in lengths[question.kind]


def test_every_kind_is_asked_of_every_form_that_has_it(question_rows: Dataset) -> None:
    counted = Counter(question_rows["kind"])
    assert set(counted) == set(QUESTION_KINDS)
    assert min(counted.values()) >= 5


def test_a_page_is_not_asked_the_same_twice(cache_dir: Path) -> None:
    for row in load_pages("train", 12, cache_dir=cache_dir):
        assert len(set(row["questions"])) == len(row["questions"]) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ["colour"]}, "kinds contains 'colour'"),
        ({"split": "dev"}, "split is 'dev'"),
        ({"max_entries": 16}, "max_entries is 16; allowed are 1 to 15"),
        ({"text_share": 1.5}, "text_share is 1.5; allowed are 0 to 1"),
        ({"num_pages": 0}, "num_pages is 0"),
    ],
)
def test_what_is_not_allowed_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pages(**{"split": "train", "num_pages": 1} | arguments)


# Tokens


def test_a_glyph_is_a_token_and_answers_are_decoded_as_they_stand(question_rows: Dataset) -> None:
    tokenizer = build_page_processor().tokenizer
    for question, answer in zip(question_rows["question"], question_rows["answer"], strict=True):
        ids = tokenizer(answer)["input_ids"]
        assert len(ids) == len(answer.replace(" ", ""))
        assert tokenizer.decode(ids) == answer
        assert tokenizer.unk_token_id not in tokenizer(question)["input_ids"]


def test_a_question_may_be_written_as_people_write() -> None:
    tokenizer = build_page_processor().tokenizer
    assert tokenizer("What is the value of KX?") == tokenizer("what is the value of KX ?")
    assert tokenizer.tokenize("often of") == ["o", "##f", "##t", "##e", "##n", "of"]


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(pages).failed == 0
