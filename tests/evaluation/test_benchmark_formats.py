"""The benchmarks' files in their true layouts, a few rows of each, and what is said of files in other forms."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adavtp.evaluation.data.benchmarks import BENCHMARKS, read_benchmark
from adavtp.evaluation.data.examples import Example
from adavtp.evaluation.data.names import read_data

SHORT = "\nAnswer the question using a single word or phrase."
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def write(path: Path, content: Any) -> None:
    """JSON; lines of it for a list in a `.jsonl` file or in POPE's, which are called `.json`; text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def ten(*answers: str) -> list[dict[str, Any]]:
    """Answers in the form of VQA: the last one is given by all who are left."""
    texts = list(answers) + [answers[-1]] * (10 - len(answers))
    return [{"answer_id": place, "answer": text, "answer_confidence": "yes"} for place, text in enumerate(texts, 1)]


def write_vqav2(folder: Path) -> None:
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 393225, "question": "Is it hot?", "question_id": 393225001},
    ]
    annotations = [
        {"question_id": 393225001, "image_id": 393225, "answer_type": "yes/no", "answers": ten("no", "yes")},
        {"question_id": 262148000, "image_id": 262148, "answer_type": "other", "answers": ten("down", "at table")},
    ]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions, "data_type": "mscoco"})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations, "data_type": "mscoco"})
    for number in (262148, 393225):
        draw(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")


def write_vqav2_with_prompts(folder: Path) -> None:
    write_vqav2(folder)
    rows = [
        {"question_id": 393225001, "image": "COCO_val2014_000000393225.jpg", "text": f"Is it hot?{SHORT}"},
        {"question_id": 262148000, "image": "COCO_val2014_000000262148.jpg", "text": "Where?"},
    ]
    write(folder / "llava_vqav2_mscoco_val2014.jsonl", [row | {"category": "default"} for row in rows])
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()


def write_gqa(folder: Path, annotations: str = "data") -> None:
    rows = [
        {"question_id": "201307251", "image": "n161313.jpg", "text": f"Is it overcast?{SHORT}", "category": "default"},
        {"question_id": "201640614", "image": "n235859.jpg", "text": f"Who wears it?{SHORT}", "category": "default"},
    ]
    write(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    questions = {
        "201640614": {"imageId": "n235859", "question": "Who wears it?", "answer": "women"}
        | {"types": {"structural": "query", "semantic": "rel", "detailed": "relS"}},
        "201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no"}
        | {"types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"}},
    }
    write(folder / annotations / "testdev_balanced_questions.json", questions)
    for row in rows:
        draw(folder / "data" / "images" / row["image"])


def write_textvqa(folder: Path) -> None:
    image = "003a8ae2ef43b901"
    rows = [
        {"question_id": image, "image": f"{image}.jpg"}
        | {"text": f"what is the brand of this camera?\nReference OCR token: Dakota, DIGITAL{SHORT}"},
        {"question_id": image, "image": f"{image}.jpg"} | {"text": f"Reference OCR token: 5\nHow many?{SHORT}"},
        {"question_id": image, "image": f"{image}.jpg"} | {"text": f"what colour?{SHORT}"},
    ]
    write(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    shared = {"image_id": image, "set_name": "val"}
    annotations = [
        shared | {"question_id": 34604, "question": "what colour?", "answers": ["red"] * 10},
        shared | {"question_id": 34602, "question": "what is the brand of this camera?", "answers": ["dakota"] * 10},
        shared | {"question_id": 34603, "question": "how many?", "answers": ["5"] * 9 + ["five"]},
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": annotations})
    draw(folder / "train_images" / f"{image}.jpg")


def write_vizwiz(folder: Path) -> None:
    annotations = [
        {"image": "VizWiz_val_00000000.jpg", "question": "Ok. There is another picture I hope it is a better one."}
        | {"answers": ten("unanswerable"), "answer_type": "unanswerable", "answerable": 0},
        {"image": "VizWiz_val_00000001.jpg", "question": "What is this?"}
        | {"answers": ten("cup", "mug"), "answer_type": "other", "answerable": 1},
    ]
    write(folder / "val.json", annotations)
    for row in annotations:
        draw(folder / "val" / row["image"])


def write_scienceqa(folder: Path) -> None:
    shown = "Context: The image shows a map.\nQuestion: Which is north?\nOptions: (A) Ohio (B) Texas\n<image>"
    told = "Context: N/A\nQuestion: Which is a sentence?\nOptions: (A) He ran. (B) Ran. (C) He."
    rows = [
        {"id": "5", "image": "5/image.png"} | {"conversations": turns(shown, "The answer is A.")},
        {"id": "11"} | {"conversations": turns(told, "The answer is C.")},
        {"id": "99"} | {"conversations": turns(told, "The answer is B.")},
    ]
    write(folder / "llava_test_CQM-A.json", rows)
    write(folder / "pid_splits.json", {"train": ["99"], "val": [], "test": ["5", "11"]})
    problems = {
        "5": {"question": "Which is north?", "choices": ["Ohio", "Texas"], "answer": 0, "subject": "social science"},
        "11": {"question": "Which?", "choices": ["He ran.", "Ran.", "He."], "answer": 2, "subject": "language"},
        "99": {"question": "Which?", "choices": ["He ran.", "Ran.", "He."], "answer": 1, "subject": "language"},
    }
    write(folder / "problems.json", problems)
    draw(folder / "images" / "test" / "5" / "image.png")


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_pope(folder: Path) -> None:
    first, second = "COCO_val2014_000000310196.jpg", "COCO_val2014_000000210789.jpg"
    rows = [
        {"question_id": 0, "image": first, "text": f"Is there a snowboard in the image?{SHORT}", "category": "random"},
        {"question_id": 1, "image": second, "text": f"Is there a dog in the image?{SHORT}", "category": "random"},
        {"question_id": 0, "image": first, "text": f"Is there a car in the image?{SHORT}", "category": "popular"},
    ]
    write(folder / "llava_pope_test.jsonl", rows)
    of_random = [
        {"question_id": 1, "image": first, "text": "Is there a snowboard in the image?", "label": "yes"},
        {"question_id": 2, "image": second, "text": "Is there a dog in the image?", "label": "no"},
    ]
    of_popular = [{"question_id": 1, "image": first, "text": "Is there a car in the image?", "label": "no"}]
    write(folder / "coco" / "coco_pope_random.json", of_random)
    write(folder / "coco" / "coco_pope_popular.json", of_popular)
    for image in (first, second):
        draw(folder / "val2014" / image)


def write_mme(folder: Path, inside: str = "") -> None:
    beside, apart = "code_reasoning/0020.png", "artwork/images/10002.jpg"
    rows = [
        mme_row(beside, beside, "Is a python code shown in the picture?"),
        mme_row(beside, beside, "Is a c++ code shown in the picture?"),
        mme_row("artwork/10002.jpg", apart, "Does this artwork exist in the form of painting?"),
        mme_row("artwork/10002.jpg", apart, "Does this artwork exist in the form of glassware?"),
    ]
    write(folder / "llava_mme.jsonl", rows)
    root = folder / "MME_Benchmark_release_version" / inside
    how = "Please answer yes or no."
    art = root / "artwork" / "questions_answers_YN" / "10002.txt"
    code = f"Is a python code shown in the picture? {how}\tYes\nIs a c++ code shown in the picture?  {how}\tNo\n\n"
    of = "Does this artwork exist in the form of"
    write(root / "code_reasoning" / "0020.txt", code)
    write(art, f"{of} painting? {how}\tNo\n{of} glassware? {how}\tYes\n")
    draw(root / beside)
    draw(root / apart)


def mme_row(own_id: str, image: str, question: str) -> dict[str, str]:
    return {"question_id": own_id, "image": image, "text": question + SHORT, "category": own_id.split("/")[0]}


def told(examples: list[Example]) -> list[tuple]:
    return [
        (example.id, [image.name for image in example.images], example.question, sorted(set(example.answers)))
        + (example.category,)
        for example in examples
    ]


def test_vqav2_is_read_from_the_official_files(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    data = read_data(f"vqav2:{tmp_path}")
    first, second = "COCO_val2014_000000262148.jpg", "COCO_val2014_000000393225.jpg"
    assert told(data.examples) == [
        ("262148000", [first], f"Where is he looking?{SHORT}", ["at table", "down"], "other"),
        ("393225001", [second], f"Is it hot?{SHORT}", ["no", "yes"], "yes/no"),
    ]
    assert data.examples[0].answers == ["down"] + ["at table"] * 9
    assert (data.metric, data.split) == ("llava_vqa_accuracy", "val2014")


def test_vqav2_is_asked_with_the_prompts_of_a_question_file(tmp_path: Path) -> None:
    write_vqav2_with_prompts(tmp_path)
    examples = read_benchmark("vqav2", tmp_path).examples
    assert [(example.id, example.question) for example in examples] == [
        ("393225001", f"Is it hot?{SHORT}"),
        ("262148000", "Where?"),
    ]
    assert examples[1].answers == ["down"] + ["at table"] * 9


@pytest.mark.parametrize("annotations", ["data", "data/questions1.2", "."])
def test_gqa_is_read_wherever_its_annotations_are_unpacked(tmp_path: Path, annotations: str) -> None:
    write_gqa(tmp_path, annotations)
    data = read_data(f"gqa:{tmp_path}")
    assert told(data.examples) == [
        ("201307251", ["n161313.jpg"], f"Is it overcast?{SHORT}", ["no"], "verify"),
        ("201640614", ["n235859.jpg"], f"Who wears it?{SHORT}", ["women"], "query"),
    ]
    assert data.metric == "gqa_accuracy"


def test_textvqa_is_matched_by_image_and_question(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    data = read_data(f"textvqa:{tmp_path}")
    image = ["003a8ae2ef43b901.jpg"]
    assert told(data.examples) == [
        (
            *("34602", image),
            f"what is the brand of this camera?\nReference OCR token: Dakota, DIGITAL{SHORT}",
            *(["dakota"], None),
        ),
        ("34603", image, f"Reference OCR token: 5\nHow many?{SHORT}", ["5", "five"], None),
        ("34604", image, f"what colour?{SHORT}", ["red"], None),
    ]
    assert data.metric == "textvqa_accuracy"


def test_vizwiz_asks_to_say_when_a_question_cannot_be_answered(tmp_path: Path) -> None:
    write_vizwiz(tmp_path)
    data = read_data(f"vizwiz:{tmp_path}")
    first = f"Ok. There is another picture I hope it is a better one.{INSUFFICIENT}{SHORT}"
    assert told(data.examples) == [
        ("0", ["VizWiz_val_00000000.jpg"], first, ["unanswerable"], "unanswerable"),
        ("1", ["VizWiz_val_00000001.jpg"], f"What is this?{INSUFFICIENT}{SHORT}", ["cup", "mug"], "other"),
    ]
    prompts = [{"question_id": 7, "image": "VizWiz_val_00000001.jpg", "text": "What?", "category": "default"}]
    write(tmp_path / "llava_val.jsonl", prompts)
    (own,) = read_benchmark("vizwiz", tmp_path).examples
    assert (own.id, own.question, own.answers) == ("7", "What?", ["cup"] + ["mug"] * 9)
    assert data.metric == "llava_vizwiz_accuracy"


def test_scienceqa_asks_for_a_letter_with_and_without_an_image(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    data = read_data(f"scienceqa:{tmp_path}")
    shown = "Context: The image shows a map.\nQuestion: Which is north?\nOptions: (A) Ohio (B) Texas"
    text = "Context: N/A\nQuestion: Which is a sentence?\nOptions: (A) He ran. (B) Ran. (C) He."
    assert told(data.examples) == [
        ("5", ["image.png"], shown + LETTER, ["A"], "social science"),
        ("11", [], text + LETTER, ["C"], "language"),
    ]
    assert [example.choices for example in data.examples] == [["Ohio", "Texas"], ["He ran.", "Ran.", "He."]]
    assert data.metric == "scienceqa_accuracy"


def test_pope_takes_each_category_s_labels_in_their_order(tmp_path: Path) -> None:
    write_pope(tmp_path)
    data = read_data(f"pope:{tmp_path}")
    first, second = "COCO_val2014_000000310196.jpg", "COCO_val2014_000000210789.jpg"
    assert told(data.examples) == [
        ("random/0", [first], f"Is there a snowboard in the image?{SHORT}", ["yes"], "random"),
        ("random/1", [second], f"Is there a dog in the image?{SHORT}", ["no"], "random"),
        ("popular/0", [first], f"Is there a car in the image?{SHORT}", ["no"], "popular"),
    ]
    assert data.metric == "pope"


@pytest.mark.parametrize("inside", ["", "MME_Benchmark"])
def test_mme_reads_both_of_its_layouts(tmp_path: Path, inside: str) -> None:
    write_mme(tmp_path, inside)
    data = read_data(f"mme:{tmp_path}")
    code, painting = "code_reasoning/0020.png", "Does this artwork exist in the form of painting?"
    assert told(data.examples) == [
        (code, ["0020.png"], f"Is a python code shown in the picture?{SHORT}", ["yes"], "code_reasoning"),
        (code, ["0020.png"], f"Is a c++ code shown in the picture?{SHORT}", ["no"], "code_reasoning"),
        ("artwork/10002.jpg", ["10002.jpg"], f"{painting}{SHORT}", ["no"], "artwork"),
        (
            *("artwork/10002.jpg", ["10002.jpg"]),
            f"Does this artwork exist in the form of glassware?{SHORT}",
            *(["yes"], "artwork"),
        ),
    ]
    assert data.metric == "mme"


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqav2": write_vqav2,
    "gqa": write_gqa,
    "textvqa": write_textvqa,
    "vizwiz": write_vizwiz,
    "scienceqa": write_scienceqa,
    "pope": write_pope,
    "mme": write_mme,
}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_file_that_is_missing_or_in_another_form_is_named(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    for path in files_of(tmp_path):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            read_benchmark(name, tmp_path)
        for content in ("{", "[]", "{}", '"text"', "[1]") if path.suffix in (".json", ".jsonl") else ():
            path.write_text(content)
            with pytest.raises(ValueError):
                read_benchmark(name, tmp_path)
        path.write_bytes(whole)
    example = next(example for example in read_benchmark(name, tmp_path).examples if example.images)
    example.images[0].unlink()
    with pytest.raises(ValueError) as error:
        read_benchmark(name, tmp_path)
    assert repr(example.id) in str(error.value) and str(example.images[0]) in str(error.value)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "reason"),
    [
        ("gqa", "llava_gqa_testdev_balanced.jsonl", '"text"', '"prompt"', "row 1 has no text"),
        ("gqa", "data/testdev_balanced_questions.json", "201307251", "7", "'201307251' is not in the annotations"),
        ("vizwiz", "val.json", '"answers": [', '"given": [', "no answers in the annotations"),
        ("scienceqa", "pid_splits.json", '"test"', '"minitest"', "the split 'test'"),
        ("pope", "coco/coco_pope_random.json", "snowboard", "surfboard", "in the same order in both"),
        ("mme", "MME_Benchmark_release_version/code_reasoning/0020.txt", "\tYes", " Yes", "question<tab>Yes"),
        (
            "mme",
            "MME_Benchmark_release_version/code_reasoning/0020.txt",
            "python",
            "java",
            "is not in the annotations",
        ),
        ("textvqa", "TextVQA_0.5.1_val.json", '"data"', '"annotations"', "with 'data'"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_was_expected(
    tmp_path: Path, name: str, file: str, old: str, new: str, reason: str
) -> None:
    WRITERS[name](tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError) as error:
        read_benchmark(name, tmp_path)
    assert reason in str(error.value)


def test_images_may_be_in_another_folder(tmp_path: Path) -> None:
    write_pope(tmp_path / "pope")
    (tmp_path / "pope" / "val2014").rename(tmp_path / "coco_images")
    data = read_data(f"pope:{tmp_path / 'pope'}", images=tmp_path / "coco_images")
    assert data.examples[0].images == [tmp_path / "coco_images" / "COCO_val2014_000000310196.jpg"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        read_data(f"gqa:{tmp_path / 'nothing'}")


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "link.png"])
def test_images_of_a_benchmark_stay_in_its_folder_unless_paths_are_trusted(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "vqav2"
    write_vqav2_with_prompts(folder)
    draw(folder / "secret.png")
    (folder / "val2014/link.png").symlink_to("../secret.png")
    questions = folder / "llava_vqav2_mscoco_val2014.jsonl"
    name = name.format(root=folder)
    questions.write_text(questions.read_text().replace("COCO_val2014_000000393225.jpg", name))
    with pytest.raises(ValueError, match="Example '393225001' shows .* leads out of"):
        read_data(f"vqav2:{folder}")
    first = read_data(f"vqav2:{folder}", trust_image_paths=True).examples[0]
    assert first.images == [folder / "val2014" / name]


def test_a_category_is_no_way_to_another_folder(tmp_path: Path) -> None:
    write_pope(tmp_path)
    questions = tmp_path / "llava_pope_test.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    write(questions, [rows[0] | {"category": "../../outside"}])
    with pytest.raises(ValueError, match="of the category '../../outside'; expected is a name"):
        read_data(f"pope:{tmp_path}")


@pytest.mark.parametrize("field", ["question_id", "image", "text"])
@pytest.mark.parametrize("value", [5, [], {}, True], ids=str)
def test_a_field_of_the_wrong_type_is_one_sentence(tmp_path: Path, field: str, value: Any) -> None:
    write_gqa(tmp_path)
    questions = tmp_path / "llava_gqa_testdev_balanced.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    write(questions, [rows[0] | {field: value}])
    with pytest.raises(ValueError, match="Example|another form"):
        read_data(f"gqa:{tmp_path}")
