"""The model `adavtp` in lmms-eval: the real command line on a small task of digit scenes, and both forms by hand.

Nothing of lmms-eval is replaced, but its own tasks are left out. Its command line runs in processes of its own,
offline; the plugin's classes are also called directly, with requests as lmms-eval builds them.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.commands.console import load_checkpoint
from adavtp.evaluation.continuations import score_continuations
from adavtp.evaluation.settings import Setting
from adavtp.tasks.digit_scenes import load_digit_questions
from forked_processes import Forks, as_launched

pytest.importorskip(
    "lmms_eval",
    reason="lmms-eval is not installed; `make test` installs it, or: pip install -c constraints.txt -e '.[test]' and "
    "pip install -c constraints.txt --no-deps lmms-eval",
)
from lmms_eval.api.instance import Instance, unwrap_generation_output  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402

from adavtp.evaluation.lmms_eval.model import generation_arguments  # noqa: E402
from repository import DIGITS, FIXTURES
from tiny_processors import family_folder

TASKS = FIXTURES / "lmms_eval_task"
NUM_QUESTIONS = 7
NUM_PATCHES = 144
FRACTION, FRACTION_KEEPS = 0.4, 57  # floor(0.4 * 144)
COUNT = 29
STACK = ["tome", "adaptive"]


@pytest.fixture(scope="module")
def questions() -> Dataset:
    """Held-out questions with one image, answers to choose from, and a running number."""
    rows = load_digit_questions("test", NUM_QUESTIONS)
    rows = rows.map(
        lambda row, index: {
            "image": row["images"][0],
            "choices": sorted({row["answer"], "red", "7", "no"}),
            "index": index,
        },
        with_indices=True,
        load_from_cache_file=False,
    )
    return rows.select_columns(["image", "question", "answer", "choices", "index"]).cast_column("image", Image())


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def workplace(questions: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set as the tasks name it."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    DatasetDict({"test": questions}).save_to_disk(folder / "scenes")
    return folder


@pytest.fixture(scope="module")
def lmms_eval(workplace: Path) -> Iterator[Forks]:
    """What runs its command line, in processes of its own, offline."""
    # Its own tasks are not listed: it reads the two thousand files of all of them before it looks for those asked for.
    installed, without_tasks = Path(find_spec("lmms_eval").origin).parent, workplace / "packages" / "lmms_eval"
    (without_tasks / "tasks").mkdir(parents=True)
    for path in installed.iterdir():
        if path.name != "tasks":
            (without_tasks / path.name).symlink_to(path)
    (without_tasks / "tasks" / "__init__.py").symlink_to(installed / "tasks" / "__init__.py")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "home")}
    environment["PYTHONPATH"] = os.pathsep.join([str(without_tasks.parent), *sys.path])
    imports = "import runpy, lmms_eval.__main__, adavtp.evaluation.lmms_eval.model"
    command = "runpy.run_module('lmms_eval', run_name='__main__', alter_sys=True)"
    with Forks(imports, command, environment, workplace) as forks:
        yield forks


def run_lmms_eval(
    forks: Forks, workplace: Path, name: str, setting: str, tasks: str, *more: str, num_processes: int = 1
) -> Path:
    """`python -m lmms_eval --model adavtp ...`; the folder with what it wrote."""
    model_args = f"pretrained={DIGITS},{setting},statistics={name}.jsonl"
    arguments = ["--model", "adavtp", "--model_args", model_args, "--tasks", tasks, "--include_path", str(TASKS)]
    arguments += ["--batch_size", "5", "--output_path", name, "--log_samples", *more]
    printed = workplace / f"{name}.txt"
    # Without the first, accelerate counts processes only where there are accelerators.
    together = [{"ACCELERATE_USE_CPU": "true"} | launched for launched in as_launched(num_processes)]
    forks.begin(["lmms_eval", *arguments], printed, together if num_processes > 1 else [{}])
    codes = forks.exit_codes()
    output = printed.read_text()
    assert codes == [0] * num_processes and "Error during evaluation" not in output, output
    return next((workplace / name).iterdir())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads(next(folder.glob("*_results.json")).read_text())


@pytest.fixture(scope="module")
def chat_run(lmms_eval: Forks, workplace: Path) -> Path:
    """The chat form at a fraction, in two processes."""
    tasks = "digit_scenes,digit_scenes_mixed"
    return run_lmms_eval(lmms_eval, workplace, "chat", f"token_budget={FRACTION}", tasks, num_processes=2)


@pytest.fixture(scope="module")
def simple_run(lmms_eval: Forks, workplace: Path) -> Path:
    """The simple form at a number of tokens, with a stack."""
    setting, tasks = f"token_budget={COUNT},reducer=[{','.join(STACK)}]", "digit_scenes,digit_scenes_choices"
    return run_lmms_eval(lmms_eval, workplace, "simple", setting, tasks, "--force_simple")


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """The reference checkpoint's model and processor, without lmms-eval."""
    return load_checkpoint(str(DIGITS))


def answers_alone(reference: tuple[Any, Any], questions: Dataset, **setting: Any) -> list[str]:
    """Our own model's answers through plain `generate`, question by question."""
    model, _ = reference
    return [model.generate(row["image"], row["question"], **setting, max_new_tokens=4) for row in questions]


SETTINGS = {
    "chat_run": {"token_budget": FRACTION},
    "simple_run": {"token_budget": COUNT, "reducer": STACK},
}


@pytest.mark.parametrize("run", SETTINGS)
def test_lmms_eval_reports_the_accuracy_that_our_model_has(
    run: str, questions: Dataset, reference: tuple[Any, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(run)
    given = answers_alone(reference, questions, **SETTINGS[run])
    samples = read_lines(next(folder.glob("*_samples_digit_scenes.jsonl")))
    assert {sample["doc_id"]: sample["filtered_resps"] for sample in samples} == dict(enumerate(given))
    expected = sum(answer == right for answer, right in zip(given, questions["answer"], strict=True)) / NUM_QUESTIONS
    assert expected > 0
    assert read_results(folder)["results"]["digit_scenes"]["exact_match,none"] == pytest.approx(expected)


@pytest.mark.parametrize(("run", "keeps"), [("chat_run", FRACTION_KEEPS), ("simple_run", COUNT)])
def test_every_request_has_a_line_and_exactly_its_budget(
    run: str, keeps: int, workplace: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(run)
    files = sorted(workplace.glob(f"{run.removesuffix('_run')}*.jsonl"))
    assert len(files) == (2 if run == "chat_run" else 1)
    lines = [line for file in files for line in read_lines(file)]
    for task in {line["task"] for line in lines} - {"digit_scenes_choices"}:
        assert sorted(line["doc_id"] for line in lines if line["task"] == task) == list(range(NUM_QUESTIONS))
    for line in lines:
        num_images = line["doc_id"] % 3 if line["task"] == "digit_scenes_mixed" else 1
        assert line["num_keep"] == [keeps] * num_images
        assert line["visual_tokens"] == (keeps if num_images else 0)
        assert line["flops"] > 0 and line["ms"] > 0
        assert 1 <= line["new_tokens"] <= 4 if line["type"] == "generate_until" else line["new_tokens"] == 0


def test_the_results_count_the_tokens_that_the_decoder_saw(
    simple_run: Path, questions: Dataset, reference: tuple[Any, Any]
) -> None:
    _, processor = reference
    results = read_results(simple_run)
    # <s> USER: <image> ... ASSISTANT:
    lengths = [len(processor.tokenizer(question).input_ids) + 3 for question in questions["question"]]
    counted = results["efficiency"]["by_task"]["digit_scenes"]["total_input_tokens"]
    assert counted == sum(lengths) + NUM_QUESTIONS * COUNT
    assert results["throughput"]["avg_visual_tokens"] == COUNT
    assert results["throughput"]["avg_flops"] > 0


def test_lmms_eval_picks_the_likeliest_choice(
    simple_run: Path, questions: Dataset, reference: tuple[Any, Any]
) -> None:
    model, processor = reference
    right = 0
    for row in questions:
        inputs = processor.of_questions([row["image"]], [row["question"]])
        outputs = model.generate(
            **inputs,
            **SETTINGS["simple_run"],
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        # Every choice is one word, and every word one token.
        words = processor.tokenizer(row["choices"], add_special_tokens=False).input_ids
        logits = outputs.logits[0][0][[ids[0] for ids in words]]
        right += row["choices"][int(logits.argmax())] == row["answer"]
    results = read_results(simple_run)["results"]["digit_scenes_choices"]
    assert results["acc,none"] == pytest.approx(right / NUM_QUESTIONS)


# ---------------------------------------------------------------- the two forms


def made(form: str, **arguments: Any) -> Any:
    """The model as lmms-eval makes it from its name, a form and `--model_args`."""
    text = ",".join(f"{name}={value}" for name, value in ({"pretrained": DIGITS} | arguments).items())
    return get_model("adavtp", force_simple=form == "simple").create_from_arg_string(text, {"device": "cpu"})


@pytest.fixture(scope="module")
def forms(questions: Dataset) -> dict[str, Any]:
    """Both forms at a fraction, with the questions as the task `scenes`."""
    models = {form: made(form, token_budget=FRACTION, batch_size=5) for form in ("chat", "simple")}
    for model in models.values():
        model.task_dict["scenes"] = {"test": questions}
    return models


def request_of(kind: str, arguments: tuple, doc_id: int, idx: int = 0) -> Instance:
    metadata = {"task": "scenes", "doc_id": doc_id, "repeats": 1}
    return Instance(request_type=kind, arguments=(*arguments, doc_id, "scenes", "test"), idx=idx, metadata=metadata)


def images_of(row: dict[str, Any]) -> list[Any]:
    return [row["image"]] * (row["index"] % 3)


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in images_of(row)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": row["question"]}]}]


def asked(form: str, questions: Dataset, generation: dict[str, Any]) -> list[Instance]:
    """Each question, with none, one or two images."""
    requests = []
    for doc_id, row in enumerate(questions):
        simple, chat = (generation, images_of), (messages_of, generation)
        arguments = (row["question"], *(simple if form == "simple" else chat))
        requests.append(request_of("generate_until", arguments, doc_id))
    return requests


def generated(model: Any, form: str, questions: Dataset) -> list[tuple[str, int, int]]:
    model.task_dict["scenes"] = {"test": questions}
    results = model.generate_until(asked(form, questions, {"max_new_tokens": 4, "until": ["\n\n"]}))
    return [(result.text, result.token_counts.input_tokens, result.token_counts.output_tokens) for result in results]


def test_chat_and_simple_form_agree_whatever_shares_a_batch(questions: Dataset, forms: dict[str, Any]) -> None:
    alone = made("simple", token_budget=FRACTION, batch_size=1)
    chat = generated(forms["chat"], "chat", questions)
    assert chat == generated(alone, "simple", questions)
    assert len({text for text, _, _ in chat}) > 2


def test_a_folder_of_another_family_answers_in_both_forms(questions: Dataset, tmp_path: Path) -> None:
    arguments = {"pretrained": family_folder("idefics3", tmp_path / "model"), "token_budget": 0.5, "reducer": "grid"}
    chat, simple = (made(form, **arguments, batch_size=3) for form in ("chat", "simple"))
    answers = generated(chat, "chat", questions)
    assert answers == generated(simple, "simple", questions)
    full = generated(made("chat", **arguments | {"token_budget": 1.0, "reducer": "full"}), "chat", questions)
    # No image, one, two; of each five tiles of 16 tokens.
    assert [whole[1] - own[1] for whole, own in zip(full, answers, strict=True)] == [
        5 * 8 * (number % 3) for number in range(NUM_QUESTIONS)
    ]


def test_log_likelihoods_are_those_of_the_continuation_behind_the_prompt(
    questions: Dataset, forms: dict[str, Any], reference: tuple[Any, Any]
) -> None:
    continuations = [" red", " 7 of blue", lambda row: row["answer"]]
    requests = [
        request_of("loglikelihood", (questions[doc_id]["question"], continuation, lambda row: [row["image"]]), doc_id)
        for doc_id in range(2)
        for continuation in continuations
    ]
    for request, response in zip(requests, forms["simple"].loglikelihood(requests), strict=True):
        (negative, is_greedy), _ = unwrap_generation_output(response)
        row = questions[request.doc_id]
        said = request.args[1] if isinstance(request.args[1], str) else " " + row["answer"]
        prompt = f"<s>USER: <image> {row['question']} ASSISTANT:"
        (one,) = score_continuations(*reference, [prompt], [said], [[row["image"]]], Setting("adaptive", FRACTION))
        # lmms-eval takes the choice with the least number.
        assert -negative == pytest.approx(one.log_likelihood, abs=1e-4)
        assert is_greedy == one.is_greedy


def rounds_of_task(row: dict[str, Any], previous_output: list[str], round_idx: int, previous_round_info: Any) -> tuple:
    """Asks for the largest digit, and then for the colour of whatever was answered."""
    if round_idx == 2:
        return None, None, True, previous_output, previous_round_info
    assert previous_round_info is None and len(previous_output) == 1
    return [row["image"]], f"what colour is the {previous_output[0]} ?", False, previous_output, "asked"


@pytest.mark.parametrize("form", ["chat", "simple"])
def test_later_rounds_ask_what_the_task_makes_of_earlier_answers(
    form: str, questions: Dataset, forms: dict[str, Any], reference: tuple[Any, Any]
) -> None:
    first = "which digit is the largest ?"

    def doc_to_messages(row: dict[str, Any], round_idx: int | None = None, **more: Any) -> Any:
        images, text, is_over, outputs, info = [row["image"]], first, False, None, None
        if round_idx is not None:
            images, text, is_over, outputs, info = rounds_of_task(row, round_idx=round_idx, **more)
        if is_over:
            return None, True, outputs, info
        content = [{"type": "image", "url": images[0]}, {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        return turns if round_idx is None else (turns, False, outputs, info)

    generation = {"max_new_tokens": 4}
    simple = (first, generation, lambda row: [row["image"]], rounds_of_task)
    requests = [
        request_of(
            "generate_until_multi_round", simple if form == "simple" else (first, doc_to_messages, generation), doc_id
        )
        for doc_id in range(2)
    ]
    model, _ = reference
    for row, outputs in zip(questions, forms[form].generate_until_multi_round(requests), strict=False):
        digit = model.generate(row["image"], first, token_budget=FRACTION, max_new_tokens=4)
        colour = model.generate(row["image"], f"what colour is the {digit} ?", token_budget=FRACTION, max_new_tokens=4)
        assert outputs == [digit, colour]


def test_placeholders_in_a_question_are_where_its_images_go(questions: Dataset, forms: dict[str, Any]) -> None:
    text = questions[0]["question"]
    plain, written = forms["simple"].generate_until(
        [
            request_of("generate_until", (asked, {"max_new_tokens": 4}, lambda row: [row["image"]]), 0)
            for asked in (text, f"<image> {text}")
        ]
    )
    assert plain == written


# ---------------------------------------------------------------- a task's generation_kwargs


# A task's `generation_kwargs`, and what of `generate`'s arguments they come to.
KWARGS = [
    ({}, {"max_new_tokens": 9, "do_sample": False}),
    ({"max_new_tokens": 3, "temperature": 0}, {"max_new_tokens": 3, "do_sample": False}),
    ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
    ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "temperature": None, "top_p": None}),
    ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
    ({"do_sample": True}, {"do_sample": True}),
    ({"num_beams": 3, "top_p": None}, {"num_beams": 3, "do_sample": False}),
]


@pytest.mark.parametrize(("given", "expected"), KWARGS)
def test_generation_kwargs_mean_what_they_mean_for_other_models(given: dict, expected: dict) -> None:
    arguments, stop = generation_arguments(given, 9)
    assert expected.items() <= ({"num_beams": 1, "max_new_tokens": 9} | arguments).items()
    assert stop == []


def test_stop_strings_come_as_one_or_as_a_list_and_other_models_options_do_not_reach_generate() -> None:
    assert generation_arguments({"until": "\n"}, 9)[1] == ["\n"]
    assert generation_arguments({"until": ["a", "b"]}, 9)[1] == ["a", "b"]
    assert "image_aspect_ratio" not in generation_arguments({"image_aspect_ratio": "pad"}, 9)[0]
    for refused, message in (({"until": ["a", ""]}, "until"), ({"token_budget": 0.2}, "model_args")):
        with pytest.raises(ValueError, match=message):
            generation_arguments(refused, 9)


def test_requests_of_different_tasks_keep_their_own_generation_kwargs(
    questions: Dataset, forms: dict[str, Any]
) -> None:
    short, long = (asked("simple", questions, {"max_new_tokens": number}) for number in (1, 4))
    mixed = [pair[index % 2] for index, pair in enumerate(zip(short, long, strict=True))][1:5:3] + long[1:3]
    counts = [result.token_counts.output_tokens for result in forms["simple"].generate_until(mixed)]
    # A word, and the end of text.
    assert counts == [2, 1, 2, 2]


# ---------------------------------------------------------------- checkpoints and refusals


def plain_llava(folder: Path) -> Path:
    """A small LLaVA in transformers' own class, with the reference checkpoint's words and weights."""
    ours = AdaVTPForConditionalGeneration.from_pretrained(DIGITS)
    given: AdaVTPConfig = ours.config
    names = ("image_token_index", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length")
    config = LlavaConfig(
        vision_config=given.vision_config.to_dict(),
        text_config=given.text_config.to_dict(),
        **{name: getattr(given, name) for name in names},
    )
    stock = LlavaForConditionalGeneration(config)
    missing, _ = stock.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    stock.save_pretrained(folder)
    AdaVTPProcessor.from_pretrained(DIGITS).save_pretrained(folder)
    return folder


def test_a_plain_llava_runs_with_reducers_that_are_not_trained(tmp_path: Path, questions: Dataset) -> None:
    folder, few = plain_llava(tmp_path / "llava"), questions.select(range(3))
    full = generated(made("chat", pretrained=folder), "chat", few)
    assert full == generated(made("chat", reducer="full"), "chat", few)
    llava = made("chat", pretrained=folder, reducer="fastv:layer=1", token_budget=FRACTION)
    reduced = generated(llava, "chat", few)
    assert [full[1][1] - reduced[1][1], full[0][1] - reduced[0][1]] == [NUM_PATCHES - FRACTION_KEEPS, 0]
    with pytest.raises(ValueError, match="no weights for the reducer 'adaptive'"):
        made("chat", pretrained=folder, token_budget=0.4)


def test_a_stack_takes_a_budget_for_each_of_its_reducers(questions: Dataset) -> None:
    few, stack = (
        questions.select(range(3)),
        made("chat", reducer="[tome,adaptive]", token_budget='{"tome":0.5,"adaptive":0.5}'),
    )
    given, full = (generated(model, "chat", few) for model in (stack, made("chat")))
    # Half of half of 144.
    assert [row[1] - other[1] for row, other in zip(given, full, strict=True)] == [0, -108, -216]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.4}, "unknown: 'budget'; allowed are pretrained, token_budget, reducer"),
        ({"token_budget": "40%"}, "`token_budget` is '40%'"),
        ({"token_budget": 1}, "1"),
        ({"token_budget": 1.5}, "1.5"),
        ({"reducer": "fastv:layer"}, "`reducer` is 'fastv:layer'"),
        ({"reducer": "nosuch"}, "nosuch"),
        ({"reducer": "full", "token_budget": 0.4}, "full"),
        ({"batch_size": "auto"}, "`batch_size` is 'auto'"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
    ],
)
def test_what_is_not_allowed_is_named_and_leaves_no_file(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        made("chat", statistics=tmp_path / "statistics.jsonl", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`pretrained` is missing"):
        get_model("adavtp").create_from_arg_string("token_budget=0.4")
    folder = tmp_path / "copy"
    shutil.copytree(DIGITS, folder, ignore=shutil.ignore_patterns("chat_template.jinja", "*.py"))
    with pytest.raises(ValueError, match="no chat template"):
        made("chat", pretrained=folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(ValueError, match="'clip_vision_model', and transformers .* has no model of it that reads"):
        made("chat", pretrained=folder)


def test_statistics_are_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("measured\n")
    with pytest.raises(FileExistsError, match="`statistics` is .*there.jsonl"):
        made("chat", statistics=tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "measured\n"


@pytest.mark.parametrize("form", ["chat", "simple"])
@pytest.mark.parametrize(("kind", "file"), [("video", "a.mp4"), ("audio", "a.wav")])
def test_what_a_model_cannot_be_shown_is_refused(form: str, kind: str, file: str, forms: dict[str, Any]) -> None:
    """Of videos LLaVA reads none; tests/with_video_packages has those that do."""
    chat = [{"role": "user", "content": [{"type": kind, "url": file}, {"type": "text", "text": "?"}]}]
    arguments = ("?", {}, lambda row: [file]) if form == "simple" else ("?", lambda row: chat, {})
    refused = {
        "video": "AdaVTPProcessor reads none",
        "audio": "adavtp looks at images and videos|A task shows 'a.wav'",
    }
    with pytest.raises(ValueError, match=refused[kind]):
        forms[form].generate_until([request_of("generate_until", arguments, 0)])
