"""The benchmarks that LLaVA-1.5 was evaluated on, read from local copies of their files.

A folder is laid out as LLaVA's evaluation expects it (`playground/data/eval/<benchmark>`): LLaVA's own question file,
which has the prompts, beside the benchmark's annotations and images as they are published. Where there is no question
file for a split, the questions come from the annotations with the words that LLaVA's prompts end in.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .examples import EvaluationData, Example, existing_image

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER_ONLY = "\nAnswer with the option's letter from the given choices directly."

# The fields of LLaVA's question files.
PROMPT = ("question_id", "image", "text")
OCR_HINT = "Reference OCR token:"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Images:
    """The folder of a benchmark's images, and whether names and links that lead out of it are followed."""

    folder: Path
    trust_paths: bool = False


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark's format.

    Attributes:
        read: from its folder, the split and the folder of images to examples.
        metric: name of the metric module that scores them.
        split: the one whose answers are public.
        images: where they usually are in the folder.
    """

    read: Callable[[Path, str, "Images"], Iterable[Example]]
    metric: str
    split: str
    images: str


def read_benchmark(
    name: str,
    folder: Path,
    split: str | None = None,
    images: Path | None = None,
    trust_image_paths: bool = False,
) -> EvaluationData:
    """
    Reads a local copy of a benchmark.

    Args:
        name: a key of [`BENCHMARKS`].
        split: by default the one whose answers are public.
        images: folder of the images, if it is not where LLaVA's evaluation has it.
        trust_image_paths: follow paths of images that lead out of that folder, absolute, with `..` or by a link.

    Raises:
        ValueError: if a file or an image is missing, has another form, or is not in its folder; the message says which
            and what is expected.
    """
    benchmark = BENCHMARKS[name]
    if not folder.is_dir():
        raise ValueError(f"`data` is '{name}:{folder}', and there is no folder {folder}.")
    split = split or benchmark.split
    place = Images(images or folder / benchmark.images.format(split=split), trust_image_paths)
    try:
        examples = list(benchmark.read(folder, split, place))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # Whatever a field of some row is in place of what the benchmark has there.
        raise ValueError(
            f"`data` is '{name}:{folder}', where a row has another form ({type(error).__name__}: {error}); expected "
            f"is the layout of LLaVA's evaluation, see {benchmark.read.__name__} in {__name__}."
        ) from error
    if not examples:
        raise ValueError(f"`data` is '{name}:{folder}', whose question file has no questions for split {split!r}.")
    return EvaluationData(f"{name}:{folder}", split, examples, benchmark.metric)


def read_vqav2(folder: Path, split: str, images: Images) -> Iterator[Example]:
    """
    `llava_vqav2_mscoco_<split>.jsonl` or the official `v2_OpenEnded_mscoco_<split>_questions.json`, the official
    `v2_mscoco_<split>_annotations.json`, and the images in `<split>/`. The category is the type of answer.
    """
    annotations = _object(folder / f"v2_mscoco_{split}_annotations.json", "annotations")
    by_id = {annotation["question_id"]: annotation for annotation in _fields(annotations, "question_id", "answers")}
    prompts = folder / f"llava_vqav2_mscoco_{split}.jsonl"
    if prompts.is_file():
        rows = _json_lines(prompts, *PROMPT)
    else:
        asked = _object(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", "questions")
        rows = [
            {"question_id": one["question_id"], "text": one["question"] + SHORT_ANSWER}
            | {"image": f"COCO_{split}_{one['image_id']:012d}.jpg"}
            for one in asked
        ]
    for row in rows:
        annotation = _annotation(by_id, row["question_id"], row["question_id"])
        answers = [answer["answer"] for answer in annotation["answers"]]
        yield _example(row["question_id"], row, images, answers, annotation.get("answer_type"))


def read_gqa(folder: Path, split: str, images: Images) -> Iterator[Example]:
    """
    `llava_gqa_<split>.jsonl`, the official `<split>_questions.json` in the folder, in `data/` or in
    `data/questions1.2/`, and the images in `data/images/`. The category is the question's structural type.
    """
    name = f"{split}_questions.json"
    places = [folder / "data" / name, folder / "data" / "questions1.2" / name, folder / name]
    annotations = _object(next((place for place in places if place.is_file()), places[0]))
    for row in _json_lines(folder / f"llava_gqa_{split}.jsonl", *PROMPT):
        annotation = _annotation(annotations, str(row["question_id"]), row["question_id"])
        category = annotation.get("types", {}).get("structural")
        yield _example(row["question_id"], row, images, [annotation["answer"]], category)


def read_textvqa(folder: Path, split: str, images: Images) -> Iterator[Example]:
    """
    `llava_textvqa_<split>_v051_ocr.jsonl`, the official `TextVQA_0.5.1_<split>.json`, and the images in
    `train_images/`. A row's `question_id` is its image's, so that an annotation is found by image and question.
    """
    annotations = _object(folder / f"TextVQA_0.5.1_{split}.json", "data")
    by_question = {
        (annotation["image_id"], annotation["question"].strip().lower()): annotation
        for annotation in _fields(annotations, "image_id", "question", "answers")
    }
    for row in _json_lines(folder / f"llava_textvqa_{split}_v051_ocr.jsonl", *PROMPT):
        key = (row["question_id"], _question_of(row["text"]).lower())
        annotation = _annotation(by_question, key, row["question_id"])
        own_id = annotation.get("question_id", row["question_id"])
        yield _example(own_id, row, images, annotation["answers"])


def read_vizwiz(folder: Path, split: str, images: Images) -> Iterator[Example]:
    """
    The official `<split>.json`, the images in `<split>/`, and `llava_<split>.jsonl` where there is one. The category
    is the type of answer.
    """
    annotations = _json(folder / f"{split}.json")
    _require(isinstance(annotations, list), folder / f"{split}.json", "a list of questions")
    by_image = {annotation["image"]: annotation for annotation in _fields(annotations, "image", "question")}
    rows = [
        {"question_id": place, "image": one["image"], "text": one["question"] + UNANSWERABLE + SHORT_ANSWER}
        for place, one in enumerate(annotations)
    ]
    prompts = folder / f"llava_{split}.jsonl"
    for row in _json_lines(prompts, *PROMPT) if prompts.is_file() else rows:
        annotation = _annotation(by_image, row["image"], row["question_id"])
        answers = [answer["answer"] for answer in annotation.get("answers", [])]
        yield _example(row["question_id"], row, images, answers, annotation.get("answer_type"))


def read_scienceqa(folder: Path, split: str, images: Images) -> Iterator[Example]:
    """
    `llava_<split>_CQM-A.json`, the official `pid_splits.json` and `problems.json`, and the images in
    `images/<split>/<id>/`. Questions without an image are asked as text. The answer is the choice's letter; the
    category is the subject.
    """
    problems, splits = _object(folder / "problems.json"), _object(folder / "pid_splits.json")
    _require(split in splits, folder / "pid_splits.json", f"the split {split!r}")
    asked = set(splits[split])
    path = folder / f"llava_{split}_CQM-A.json"
    for row in _fields(_json(path), "id", "conversations", path=path):
        if row["id"] not in asked:
            continue
        problem = _annotation(problems, row["id"], row["id"])
        text = row["conversations"][0]["value"].replace("<image>", "").strip() + LETTER_ONLY
        shown, answers = {"image": row.get("image"), "text": text}, [LETTERS[problem["answer"]]]
        yield _example(row["id"], shown, images, answers, problem.get("subject"), problem["choices"])


def read_pope(folder: Path, split: str, images: Images) -> Iterator[Example]:
    """
    `llava_pope_<split>.jsonl`, the official `coco/coco_pope_<category>.json`, and the images in `val2014/`. The n-th
    question of a category in the one is the n-th line of the other.
    """
    labels: dict[str, Iterable[dict[str, Any]]] = {}
    for row in _json_lines(folder / f"llava_pope_{split}.jsonl", *PROMPT, "category"):
        category = _plain_name(row["category"], row["question_id"])
        path = folder / "coco" / f"coco_pope_{category}.json"
        if category not in labels:
            labels[category] = iter(_json_lines(path, "image", "text", "label"))
        annotation = next(labels[category], None)
        is_same = annotation is not None and annotation["image"] == row["image"]
        if not is_same or annotation["text"].strip() != _question_of(row["text"]):
            raise ValueError(
                f"Example {row['question_id']!r} asks {_question_of(row['text'])!r} about {row['image']}; {path} has "
                f"{annotation} in its place. Expected are the questions of a category in the same order in both."
            )
        own_id = f"{category}/{row['question_id']}"
        yield _example(own_id, row, images, [annotation["label"]], category)


def read_mme(folder: Path, split: str, images: Images) -> Iterator[Example]:
    """
    `llava_mme.jsonl` and the official `MME_Benchmark_release_version/<category>/`, where beside every image, or in
    `questions_answers_YN/`, there is a text file with a line `question<tab>Yes|No` for each of its two questions. The
    `id` is the image, which both questions share.
    """
    nested = images.folder / "MME_Benchmark"
    root = nested if nested.is_dir() else images.folder
    for row in _json_lines(folder / "llava_mme.jsonl", *PROMPT):
        category = _plain_name(row["question_id"].partition("/")[0], row["question_id"])
        name = f"{Path(row['image']).stem}.txt"
        places = [root / category / name, root / category / "questions_answers_YN" / name]
        path = next((place for place in places if place.is_file()), places[0])
        answers = _mme_answers(path)
        answer = _annotation(answers, _mme_question(_question_of(row["text"])), row["question_id"])
        yield _example(row["question_id"], row, Images(root, images.trust_paths), [answer], category)


def _mme_answers(path: Path) -> dict[str, str]:
    lines = [line.split("\t") for line in _text(path).splitlines() if line.strip()]
    is_whole = all(len(parts) == 2 and parts[1].strip().lower() in ("yes", "no") for parts in lines)
    _require(is_whole, path, "lines `question<tab>Yes` or `question<tab>No`")
    return {_mme_question(question): answer.strip().lower() for question, answer in lines}


def _mme_question(text: str) -> str:
    """LLaVA's file leaves out how to answer, and some of the official files have two spaces before it."""
    return " ".join(text.replace("Please answer yes or no.", "").split())


BENCHMARKS = {
    "vqav2": Benchmark(read_vqav2, "llava_vqa_accuracy", "val2014", "{split}"),
    "gqa": Benchmark(read_gqa, "gqa_accuracy", "testdev_balanced", "data/images"),
    "textvqa": Benchmark(read_textvqa, "textvqa_accuracy", "val", "train_images"),
    "vizwiz": Benchmark(read_vizwiz, "llava_vizwiz_accuracy", "val", "{split}"),
    "scienceqa": Benchmark(read_scienceqa, "scienceqa_accuracy", "test", "images/{split}"),
    "pope": Benchmark(read_pope, "pope", "test", "val2014"),
    "mme": Benchmark(read_mme, "mme", "test", "MME_Benchmark_release_version"),
}


def _plain_name(name: str, own_id: Any) -> str:
    """A name that becomes that of a file or a folder, and may not lead anywhere else."""
    if name != Path(name).name:
        raise ValueError(f"Example {str(own_id)!r} is of the category {name!r}; expected is a name without folders.")
    return name


def _example(own_id: Any, row: dict[str, Any], images: Images, answers: list[str], *more: Any) -> Example:
    """`more` is the category, and the choices."""
    where = f"Example {str(own_id)!r}"
    if not answers:
        raise ValueError(f"{where} has no answers in the annotations; expected is a split whose answers are public.")
    texts = [row["text"], *answers, *([] if row["image"] is None else [row["image"]])]
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{where} has {strange[0]!r} where text is expected.")
    named = [] if row["image"] is None else [row["image"]]
    shown = [existing_image(image, images.folder, where, images.trust_paths) for image in named]
    return Example(str(own_id), shown, row["text"], list(answers), *more)


def _question_of(text: str) -> str:
    """The line of a prompt that is the question: neither text read off the image nor how to answer."""
    lines = [line.strip() for line in text.split("\n")]
    return next(line for line in lines if not line.startswith(OCR_HINT))


def _annotation(annotations: dict[Any, Any], key: Any, own_id: Any) -> Any:
    if key not in annotations:
        raise ValueError(
            f"Example {own_id!r} is not in the annotations, under {key!r}; expected are those of its split."
        )
    return annotations[key]


def _require(is_so: bool, path: Path, expected: str) -> None:
    if not is_so:
        raise ValueError(f"{path} has another form; expected is {expected}.")


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected is the layout of LLaVA's evaluation, see {__name__}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


def _json(path: Path) -> Any:
    return _parsed(_text(path), str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _object(path: Path, field: str | None = None) -> Any:
    """A JSON object, or what it has under a name."""
    content = _json(path)
    expected = "a JSON object" if field is None else f"a JSON object with {field!r}"
    _require(isinstance(content, dict) and (field is None or field in content), path, expected)
    return content if field is None else content[field]


def _json_lines(path: Path, *fields: str) -> list[dict[str, Any]]:
    lines = enumerate(_text(path).splitlines(), start=1)
    rows = [_parsed(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return _fields(rows, *fields, path=path)


def _fields(rows: Any, *fields: str, path: Path | None = None) -> list[dict[str, Any]]:
    """The rows, if they are a list of objects that all have these fields."""
    where = "The annotations" if path is None else path
    if not isinstance(rows, list):
        raise ValueError(f"{where} are a {type(rows).__name__}; expected is a list of objects.")
    for number, row in enumerate(rows, start=1):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f"{where}, row {number} has no {', '.join(missing)}; expected are {', '.join(fields)}.")
    return rows
