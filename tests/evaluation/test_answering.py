"""Answers and what they cost, on a tiny model: every line of a run against the model asked one by one."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from adavtp.evaluation.answering import answer_examples, inputs_of, score_together
from adavtp.evaluation.continuations import continued
from adavtp.evaluation.data.examples import Example
from adavtp.evaluation.metric_modules import score_examples
from adavtp.evaluation.prompt_costs import CountedFlops
from adavtp.evaluation.runs import Answer, Run
from adavtp.evaluation.settings import Setting, asked_settings, reachable_settings
from adavtp.evaluation.summary import evaluation_record, unfinished
from adavtp.modeling.costs.model_costs import ModelCosts
from tiny_conversations import QUESTIONS, digit_model, digit_processor, picture
from tiny_models import NUM_PATCHES, tiny_text_config

BUDGETS = [0.5, 9]
REDUCERS = ["full", "adaptive", {"name": "fastv", "layer": 1}]


@pytest.fixture(scope="module")
def processor() -> Any:
    return digit_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return digit_model(processor, text_config=tiny_text_config(vocab_size=len(processor.tokenizer), num_layers=3))


@pytest.fixture(scope="module")
def settings(model: Any) -> list[Setting]:
    return asked_settings(NUM_PATCHES, REDUCERS, BUDGETS)


def examples_with(*num_images: int) -> list[Example]:
    """Questions that show so many images each; the right answers are words that the tiny model may say."""
    examples = []
    for number, images in enumerate(num_images):
        shown = [picture(10 * number + place) for place in range(images)]
        question = QUESTIONS[number % len(QUESTIONS)] * (1 + number % 2)
        category = ["odd", "even"][number % 2]
        examples.append(Example(f"q{number}", shown, question, ["red", "7"], category))
    return examples


EXAMPLES = examples_with(1, 1, 2, 0, 1, 1, 1)


def begun(folder: Path, settings: list[Setting], metric: str = "exact_match", **fields: Any) -> Run:
    run = Run.begin(
        folder,
        {
            "command": "adavtp evaluate",
            "checkpoint_hash": "c",
            "data_hash": "d",
            "metric": metric,
            "max_new_tokens": 4,
            "settings": [{"reducer": one.label, "budget": one.key[1], "num_keep": one.num_keep} for one in settings],
            "unreachable": [],
            "num_patches": NUM_PATCHES,
            "num_examples": len(EXAMPLES),
        }
        | fields,
    )
    run.write_header()
    run.merge()
    return run


def answered(
    model: Any, folder: Path, settings: list[Setting], examples: list[Example] = EXAMPLES, **options: Any
) -> Run:
    run = begun(folder, settings)
    options = {"max_new_tokens": 4, "batch_size": 3, "shown": 2} | options
    answer_examples(model, digit_processor(), examples, settings, run, **options)
    run.merge()
    return run


@pytest.fixture(scope="module")
def whole(model: Any, settings: list[Setting], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return answered(model, tmp_path_factory.mktemp("whole"), settings)


def untimed(run: Run) -> list[dict[str, Any]]:
    return [vars(answer) | {"ms": None} for answer in run.answers()]


def test_what_is_out_of_reach_is_listed_with_its_reason(model: Any, processor: Any) -> None:
    asked = asked_settings(NUM_PATCHES, ["full", "fastv:layer=2".partition(":")[0], "resampler"], [0.1, 0.9])
    inputs = inputs_of(processor, EXAMPLES[:1])
    reachable, unreachable = reachable_settings(model, inputs, asked)
    assert [one.key for one in reachable] == [("full", 1.0), ("fastv", 0.9)]
    assert [(row["reducer"], row["budget"]) for row in unreachable] == [
        ("fastv", 0.1),
        ("resampler", 0.1),
        ("resampler", 0.9),
    ]
    assert "cannot go below" in unreachable[0]["reason"] and "weights to learn" in unreachable[1]["reason"]
    with pytest.raises(ValueError, match="nosuch"):
        reachable_settings(model, inputs, [Setting("nosuch", 0.5)])


def test_every_line_says_what_the_model_says_when_it_is_asked_alone(
    model: Any, processor: Any, whole: Run, settings: list[Setting]
) -> None:
    lines = whole.answers()
    assert [one.key for one in lines] == [(*asked.key, index) for asked in settings for index in range(len(EXAMPLES))]
    by_label = {asked.key: asked for asked in settings}
    end, num_layers = model.generation_config.eos_token_id, model.config.text_config.num_hidden_layers
    for line in lines:
        example, asked = EXAMPLES[line.index], by_label[line.setting]
        assert (line.id, line.question, line.category) == (example.id, example.question, example.category)
        assert line.num_keep == {1.0: 16, 0.5: 8, 9: 9}[line.budget]
        inputs = inputs_of(processor, [example])
        arguments = asked.arguments()
        output = model.generate(**inputs, **arguments, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        assert line.new_tokens == len(new)
        assert line.prediction == processor.decode(new, skip_special_tokens=True).strip()
        assert line.score == float(line.prediction in ("red", "7"))
        placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert line.text_tokens == inputs["input_ids"].shape[1] - placeholders
        assert placeholders == NUM_PATCHES * len(example.images)
        if not example.images:
            assert line.visual_tokens == 0
        elif line.reducer == "fastv:layer=1":
            # The mean over layers is exact: layer 0 sees all, and the others share what is left of 3 K.
            depth = output["selection"].depth
            assert line.visual_tokens == pytest.approx(depth.sum().item() / num_layers / len(depth))
            assert line.visual_tokens == pytest.approx(line.num_keep, abs=1 / num_layers)
        else:
            assert line.visual_tokens == line.num_keep
        counted = ModelCosts.of(model.config).of_selection(output["selection"], line.text_tokens, **arguments)
        assert line.flops == counted.with_new_tokens(len(new))
        assert line.ms > 0


def test_time_is_that_of_generate_alone(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    inputs, flops = inputs_of(processor, EXAMPLES[:2]), CountedFlops(model.config, Setting("adaptive", 0.5))
    answers = continued(model, processor, inputs, flops, max_new_tokens=2)
    assert [one.cost.milliseconds for one in answers] == [1250.0, 1250.0]


@pytest.mark.parametrize("stop_after", [0, 5])
def test_an_interrupted_run_goes_on_without_repeating_or_losing_an_answer(
    model: Any, settings: list[Setting], whole: Run, tmp_path: Path, stop_after: int
) -> None:
    def interrupted(units: list[Any]) -> Any:
        for number, unit in enumerate(units):
            if number == stop_after:
                raise KeyboardInterrupt
            yield unit

    with pytest.raises(KeyboardInterrupt):
        answered(model, tmp_path, settings, progress=interrupted)
    own = tmp_path / "answers_of_process_00000.jsonl"
    if own.exists():
        # As if it had been killed while it wrote the last line.
        own.write_bytes(own.read_bytes()[:-7])
    asked_again = []

    def noted(units: list[Any]) -> Any:
        for unit in units:
            asked_again.append((unit[0], unit[1].key))
            yield unit

    run = answered(model, tmp_path, settings, progress=noted)
    assert untimed(run) == untimed(whole)
    assert len(run.path.read_text().splitlines()) == len(settings) * len(EXAMPLES)
    num_units = len(settings) * math.ceil(len(EXAMPLES) / 3)
    assert len(asked_again) == num_units - max(stop_after - 1, 0)


@pytest.mark.parametrize(("begun_by", "finished_by"), [(2, 1), (1, 3)])
def test_any_number_of_processes_leaves_the_same_answers(
    model: Any, settings: list[Setting], whole: Run, tmp_path: Path, begun_by: int, finished_by: int
) -> None:
    run = begun(tmp_path, settings)
    options = {"max_new_tokens": 4, "batch_size": 3, "shown": 2}
    arguments = (model, digit_processor(), EXAMPLES, settings)
    # Of the first ones only one gets to its work.
    first = SimpleNamespace(process_index=begun_by - 1, num_processes=begun_by)
    answer_examples(*arguments, run, **options, process=first, progress=lambda units: units[:2])
    run = begun(tmp_path, settings)
    done = len(run.done())
    assert done > 0
    for rank in range(finished_by):
        process = SimpleNamespace(process_index=rank, num_processes=finished_by)
        answer_examples(*arguments, run, **options, process=process)
    # Nobody answered what another had answered, or was to answer.
    written = [text for path in tmp_path.glob("*.jsonl") for text in path.read_text().splitlines()]
    assert len(written) == len(settings) * len(EXAMPLES)
    run.merge()
    assert untimed(run) == untimed(whole)


def test_settings_that_an_interruption_left_unfinished_are_named_and_left_out(
    model: Any, settings: list[Setting], tmp_path: Path
) -> None:
    answered(model, tmp_path, settings[:2])
    run = begun(tmp_path, settings)
    run.append([answered_by(settings[2], 0, 1.0)])
    assert [(row["reducer"], row["budget"]) for row in evaluation_record(run)["rows"]] == [
        asked.key for asked in settings[:2]
    ]
    missing = [(asked["reducer"], asked["budget"], number) for asked, number in unfinished(run)]
    assert missing == [(*settings[2].key, 1), *[(*asked.key, 0) for asked in settings[3:]]]


def test_pictures_and_kept_patches_of_the_first_examples(
    model: Any, processor: Any, whole: Run, settings: list[Setting]
) -> None:
    assert {path.name for path in (whole.folder / "pictures").glob("*.png")} == {"0.png", "1.png"}
    for index in (0, 1):
        seen = Image.open(whole.picture(index)).convert("RGB")
        assert seen.size == EXAMPLES[index].images[0].size
        assert (torch.tensor(seen.getdata()) - torch.tensor(EXAMPLES[index].images[0].getdata())).abs().max() <= 1
    kept = {one.key: one.layers_seen for one in whole.answers() if one.layers_seen is not None}
    assert set(kept) == {(*asked.key, index) for asked in settings for index in (0, 1)}
    for asked in settings:
        inputs = inputs_of(processor, EXAMPLES[1:2])
        selection = model.select_tokens(**inputs, **asked.arguments())
        expected = 3 * selection.keep[0].long() if selection.depth is None else selection.depth[0]
        assert kept[*asked.key, 1] == expected.tolist()


def test_an_image_that_cannot_be_decoded_is_named_by_its_example(processor: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    examples = [EXAMPLES[0], Example("q9", [broken], "which digit is red ?", ["7"])]
    with pytest.raises(ValueError, match="'q9'.*decoded"):
        inputs_of(processor, examples)


def test_conversations_are_asked_as_they_are(processor: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which digit is red ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
        {"role": "user", "content": [{"type": "text", "text": "is there a 3 ?"}]},
    ]
    whole = Example("q", [picture()], "is there a 3 ?", ["yes"], messages=messages)
    alone = Example("q", [picture()], "which digit is red ?", ["7"], messages=messages[:1])
    plain = Example("q", [picture()], "which digit is red ?", ["7"])
    text = processor.decode(inputs_of(processor, [whole])["input_ids"][0])
    assert text.index("red") < text.index(" 7") < text.index("there") and text.count("<image>") == NUM_PATCHES
    assert inputs_of(processor, [alone])["input_ids"].tolist() == inputs_of(processor, [plain])["input_ids"].tolist()


def answered_by(setting: Setting, index: int, score: float) -> Answer:
    return Answer(
        *(index, f"q{index}", *setting.key, "is it ?", ["yes"], "yes", score, ["odd", "even"][index % 2]),
        **{"num_keep": setting.num_keep, "visual_tokens": 4.0, "text_tokens": index, "new_tokens": 1},
        **{"flops": 10.0 * index, "ms": float(index)},
    )


def test_results_are_means_with_their_cost(tmp_path: Path, settings: list[Setting]) -> None:
    unreachable = [{"reducer": "fastv", "budget": 0.1, "reason": "too low"}]
    run = begun(tmp_path, settings[:2], unreachable=unreachable, num_examples=4)
    run.append([answered_by(settings[0], index, float(index < 3)) for index in range(4)])
    run.append([answered_by(settings[1], index, 1.0) for index in range(4)])
    record = evaluation_record(run)
    first, second = record["rows"]
    # Wilson's interval of 3 of 4 at 95%.
    assert (first["accuracy_low"], first["accuracy_high"]) == pytest.approx((0.30064, 0.95441), abs=1e-5)
    assert [first[name] for name in ("reducer", "accuracy", "milliseconds", "flops")] == ["full", 0.75, 1.5, 15.0]
    assert first["accuracy_by_kind"] == {"even": 0.5, "odd": 1.0}
    assert (first["visual_tokens"], first["decoder_tokens"]) == (4.0, 5.5)
    assert (second["accuracy"], second["accuracy_high"]) == (1.0, 1.0)
    assert record["unreachable"] == unreachable


def test_a_metric_of_all_answers_together_scores_them_at_the_end(
    model: Any, processor: Any, settings: list[Setting], tmp_path: Path
) -> None:
    run = begun(tmp_path, settings[:2], metric="cider")
    options = {"max_new_tokens": 4, "batch_size": 3}
    answer_examples(model, processor, EXAMPLES, settings[:2], run, **options)
    run.merge()
    assert {one.score for one in run.answers()} == {None}
    score_together(run, EXAMPLES)
    for asked in settings[:2]:
        own = [one for one in run.answers() if one.reducer == asked.label]
        predictions = [one.prediction for one in own]
        assert [one.score for one in own] == score_examples("cider", predictions, [["red", "7"]] * len(EXAMPLES))


def test_a_metric_that_needs_choices_says_whose_are_missing(
    model: Any, settings: list[Setting], tmp_path: Path
) -> None:
    run = begun(tmp_path, settings[:1], metric="multiple_choice")
    with pytest.raises(ValueError, match="'q0' has no choices"):
        answer_examples(model, digit_processor(), EXAMPLES, settings[:1], run)
