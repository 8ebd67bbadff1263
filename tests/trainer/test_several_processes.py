"""Several processes train as one does: with the same losses, to checkpoints that load everywhere."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from transformers import AutoModel, AutoProcessor

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor, BudgetCollator
from adavtp.trainer import sharded_models
from adavtp.trainer.data.budget_stream import BudgetStream
from adavtp.trainer.sharded_models import require_same_modules
from adavtp.trainer.whole_checkpoints import FILE_LIST, require_whole
from forked_processes import Forks, as_launched
from repository import FIXTURES
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_families import Writer, batch_of, with_budget
from tiny_processors import family_model, family_processor
from tiny_trainers import EVERY_PART, differing, weights_in, weights_of
from training_process import rows_with_text_on_one_process

SCRIPT = FIXTURES / "training_process.py"
LAUNCH = Path(sharded_models.__file__).parent / "launch"

LAUNCHERS = ("ddp", "fsdp2", "zero3")
# What torchrun's processes are told by a training argument, behind their other runs.
DEEPSPEED_BY_ARGUMENT = ("zero2", "zero3")
# How one process and FSDP2's go on, test_interrupted_training.py says.
RESUMED = ("ddp", "zero3")
ATTENTION = {"gradient_gates": "attention"}
# Whose images are of one size, and of any. Of Qwen2.5-VL and later the stock class says that its loss is a mean over
# each process's own targets, so that two processes have another one.
FAMILIES = ("internvl", "qwen2_vl")
ALL_LOSSES = {"lm": 0.5, "distillation": 2.0, "relevance": 0.25}
# What is trained, in both forms. "gather": rows of other lengths on each process, accumulated over two batches, with
# clipped gradients, Adam, and layers that are computed again in the backward pass.
FORMS: dict[str, dict[str, Any]] = {
    "mask": {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.01},
    "gather": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "learning_rate": 0.002,
        "save_strategy": "steps",
        "save_steps": 1,
    },
}


# A bias on all scores, the controller's or attention's, changes nothing; above the feature layer nothing runs.
NO_GRADIENT = r".*(score|k_proj)\.bias|model\.vision_tower\.(encoder\.layers\.2|post_layernorm)\..*"


def runs_in(folder: Path, start: Path, num_processes: int) -> list[dict[str, Any]]:
    """What one process does alone, and what each launcher's do."""
    common = {"max_steps": 2, "per_device_train_batch_size": 4 // num_processes, "train_parts": EVERY_PART}
    # Gates inside attention make a dropped token's gradient a thousand times that of its weight, and so its rounding.
    on_features = {"gradient_gates": "features"}

    def run(name: str, form: str, arguments: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        model, arguments = {"selection_output": form} | on_features, FORMS[form] | common | (arguments or {})
        place = {"folder": str(folder / name), "start_from": str(start)}
        return place | {"model": model, "arguments": arguments} | fields

    runs = [
        *(run(form, form, is_evaluated=True) for form in FORMS),
        # As the recipe for LLaVA begins: the controller alone, with gates inside attention.
        run("controller", "mask", {"train_parts": ["controller"]}, model=ATTENTION),
    ]
    for name in FAMILIES:
        place = {"family": name, "start_from": str(start.parent / name), "is_evaluated": True}
        runs.append(run(name, "gather") | place)
    if num_processes > 1:
        place = {"family": "qwen2_vl", "start_from": str(start.parent / "watching"), "is_evaluated": True}
        fields = place | {"batches": str(start.parent / "batches")}
        runs.append(run("videos", "gather", {"per_device_train_batch_size": 1}) | fields)
    if folder.name in RESUMED:
        runs.append(run("resumed", "gather", resume=str(folder / "gather" / "checkpoint-1")))
    if folder.name in ("alone", "ddp"):
        runs.append(run("losses", "mask", {"loss_weights": ALL_LOSSES}))
        runs.append(run("adapters", "mask", adapters={"r": 4, "lora_dropout": 0.0}))
    for stage in DEEPSPEED_BY_ARGUMENT if folder.name == "ddp" else ():
        runs.append(run(stage, "mask", {"deepspeed": str(LAUNCH / f"{stage}.json")}))
    return runs


def batches_of_several_kinds() -> list[dict[str, torch.Tensor]]:
    """
    Batches of one prompt. Read in turn by two processes, one has images where the other has a video, both where it has
    none, and both where it has text.
    """
    image, video = {"images": ((2, 3),), "videos": ()}, {"images": (), "videos": ((2, 2, 2),)}
    both, text = image | {"videos": ((3, 2, 2),)}, {"images": (), "videos": ()}
    writer, batches = Writer("qwen2_vl"), []
    for shown in 2 * [image, video, both, video, text, both, image, both]:
        batch = batch_of("qwen2_vl", [writer.prompt(**shown)])
        batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
        labels = batch["input_ids"].clone()
        labels[:, :-4] = -100
        batches.append(batch | {"labels": labels})
    return batches


def told_by_accelerate(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` says to each process, beside what torchrun does."""
    # In float32 here, to be compared with one process; the files say bfloat16.
    arguments = ["--config_file", str(config), "--num_processes", "2", "--mixed_precision", "no", "script.py"]
    told: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", lambda _: told.update(os.environ))
        launch_command(launch_command_parser().parse_args(arguments))
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def train_all(forks: Forks, runs: Path, environments: list[dict[str, str]]) -> None:
    said = runs.with_suffix(".txt")
    forks.begin([str(SCRIPT), "train_all", str(runs)], said, environments)
    assert forks.exit_codes(300) == [0] * len(environments), said.read_text()[-8000:]


@pytest.fixture(scope="module")
def folder(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that one process left, under `alone`, and that two did, under their launcher's name."""
    folder = tmp_path_factory.mktemp("several")
    processor = digit_processor()
    digit_model(processor).save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    for name in FAMILIES:
        family_model(name, family_processor(name)).save_pretrained(folder / name)
    with_budget("qwen2_vl").float().save_pretrained(folder / "watching")
    torch.save(batches_of_several_kinds(), folder / "batches")
    for name in ("alone", *LAUNCHERS):
        runs = runs_in(folder / name, folder / "start", 1 if name == "alone" else 2)
        (folder / f"{name}.json").write_text(json.dumps(runs))
    train_all(forks, folder / "alone.json", [{}])
    for name in LAUNCHERS:
        told = {} if name == "ddp" else told_by_accelerate(LAUNCH / f"{name}.yaml")
        train_all(forks, folder / f"{name}.json", [told | launched for launched in as_launched(2)])
    return folder


def log_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "log.json").read_text())


def told_by(run: Path) -> list[dict[str, Any]]:
    return [json.loads((run / f"process_{rank}.json").read_text()) for rank in range(2)]


# Losses


@pytest.mark.parametrize(
    ("launcher", "run"),
    [
        *((launcher, run) for launcher in LAUNCHERS for run in ("mask", "gather", "controller")),
        *(("ddp", run) for run in ("losses", "adapters")),
        *((launcher, name) for launcher in LAUNCHERS for name in FAMILIES),
    ],
)
def test_two_processes_have_the_losses_of_one(folder: Path, launcher: str, run: str) -> None:
    alone, together = log_of(folder / "alone" / run), log_of(folder / launcher / run)
    assert len(alone["losses"]) == 2
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert together["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-4)
    assert len(set(alone["losses"])) == len(alone["losses"])


@pytest.mark.parametrize(
    ("launcher", "run"), [*((launcher, "mask") for launcher in LAUNCHERS), ("ddp", "losses"), ("ddp", "adapters")]
)
def test_two_processes_end_with_the_weights_of_one(folder: Path, launcher: str, run: str) -> None:
    """Of SGD without clipping, whose steps are the gradients: each parameter's is that of all samples together."""
    alone, together = (weights_in(folder / name / run) for name in ("alone", launcher))
    assert alone.keys() == together.keys()
    start = weights_in(folder / "start")
    for name, value in alone.items():
        # A pass of the model as it was before its adapters, or of a second loss, rounds once more.
        torch.testing.assert_close(together[name], value, atol=1e-6 if run == "mask" else 1e-5, rtol=0, msg=name)
        if run == "mask":
            # So small a difference says something of the smallest steps, too.
            assert (value - start[name]).abs().max() > 2e-6 or re.fullmatch(NO_GRADIENT, name), name
        if ".lora_B." in name:
            assert value.abs().max() > 0, f"{name} starts at 0 and is to learn"


@pytest.mark.parametrize("run", DEEPSPEED_BY_ARGUMENT)
def test_deepspeed_by_a_training_argument_has_the_losses_of_one_process_too(folder: Path, run: str) -> None:
    alone, together = (log_of(folder / name)["losses"] for name in ("alone/mask", f"ddp/{run}"))
    assert together == pytest.approx(alone, abs=1e-4)
    whole = sum(value.numel() for value in weights_in(folder / "start").values())
    share = {"zero2": 1.0, "zero3": 0.5}[run]
    assert told_by(folder / "ddp" / run)[0]["numbers_held"] == pytest.approx(share * whole, rel=0.02)


def test_the_runs_had_budgets_and_texts_that_differ_between_processes() -> None:
    rows, budgets = rows_with_text_on_one_process(), BudgetStream((0.2, 1.0), "sample", seed=5)
    num_images = [len(row.get("images", [])) for row in rows]
    of_first, of_second = ([sum(num_images[start : start + 2]) for start in range(first, 24, 4)] for first in (0, 2))
    assert 0 not in of_first and of_second[::2] == [0, 0, 0] and 0 not in of_second[1::2]
    drawn = budgets.of_batch(0, 0, 4).tolist()
    assert len(set(drawn)) == 4


# What runs where


@pytest.mark.parametrize(
    ("launcher", "run"),
    [
        *((launcher, run) for launcher in LAUNCHERS for run in ("mask", "gather", *FAMILIES)),
        *((launcher, "videos") for launcher in ("fsdp2", "zero3")),
    ],
)
def test_both_processes_run_the_same_modules_in_the_same_order(folder: Path, launcher: str, run: str) -> None:
    first, second = (told["modules"] for told in told_by(folder / launcher / run))
    assert first == second
    assert any(name.startswith(("model.vision_tower", "model.visual")) for name in first)


@pytest.mark.parametrize(("launcher", "share"), [("ddp", 1.0), ("fsdp2", 0.5), ("zero3", 0.5)])
def test_each_process_holds_its_share_of_the_parameters(folder: Path, launcher: str, share: float) -> None:
    whole = sum(value.numel() for value in weights_in(folder / "start").values())
    for told in told_by(folder / launcher / "mask"):
        # Odd sizes are filled up.
        assert told["numbers_held"] == pytest.approx(share * whole, rel=0.02)


@pytest.mark.parametrize(
    ("reducers", "on_fsdp", "on_zero3"),
    [
        (["adaptive"], True, True),
        (["divprune"], True, True),
        (["cls_attention"], False, True),
        (["tome"], False, False),
        (["visionzip"], False, False),
        (["pool", "adaptive"], False, False),
        (["fastv"], False, False),
    ],
)
def test_a_model_that_would_let_processes_wait_for_each_other_is_refused(
    reducers: list[str], on_fsdp: bool, on_zero3: bool
) -> None:
    model = digit_model(digit_processor(), reducers=reducers).model
    for is_fsdp, is_allowed in ((True, on_fsdp), (False, on_zero3)):
        if is_allowed:
            require_same_modules(model, is_fsdp)
        else:
            with pytest.raises(ValueError, match=f"`reducer`.*{reducers[0]}.*DDP or ZeRO-2"):
                require_same_modules(model, is_fsdp)


@pytest.mark.parametrize("is_fsdp", [True, False])
def test_a_scheduler_that_trains_is_refused_where_processes_share_parameters(is_fsdp: bool) -> None:
    model = digit_model(digit_processor(), scheduler={"num_prefix_layers": 1}).model
    with pytest.raises(ValueError, match="`train_parts` has 'scheduler'.*DDP or ZeRO-2"):
        require_same_modules(model, is_fsdp)
    model.scheduler.requires_grad_(False)
    require_same_modules(model, is_fsdp)


# Checkpoints


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_two_processes_save_one_loads_and_it_says_the_same(folder: Path, launcher: str) -> None:
    batch = BudgetCollator(digit_processor())(conversation_rows(3)) | {"token_budget": 0.4}
    logits = []
    for name in ("alone", launcher):
        model = AdaVTPForConditionalGeneration.from_pretrained(folder / name / "gather")
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_two_processes_save_is_the_folder_that_one_saves(folder: Path, launcher: str) -> None:
    """The same files: weights, configuration, processor, and the code that `trust_remote_code` runs."""
    alone, together = folder / "alone" / "mask", folder / launcher / "mask"
    written = ("process_", "log.json")
    names, of_two = (
        {path.relative_to(each).as_posix() for path in each.rglob("*") if not path.name.startswith(written)}
        for each in (alone, together)
    )
    assert names == of_two
    code = ("modeling_adavtp.py", "processing_adavtp.py", "configuration_adavtp.py")
    assert {f"adavtp_code/{name}" for name in code} <= names
    for name in sorted(names):
        if name.endswith((".py", ".json", ".jinja")) and name != "training_log.json":
            assert (together / name).read_text() == (alone / name).read_text(), name
    assert isinstance(AutoModel.from_pretrained(together), AdaVTPForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(together), AdaVTPProcessor)


@pytest.mark.parametrize("launcher", RESUMED)
def test_a_resumed_run_ends_with_the_weights_of_one_without_a_break(folder: Path, launcher: str) -> None:
    whole, resumed = (weights_in(folder / launcher / run) for run in ("gather", "resumed"))
    assert differing(whole, weights_in(folder / "start"))
    assert differing(resumed, whole) == []


@pytest.mark.parametrize("launcher", ["alone", *LAUNCHERS])
def test_a_checkpoint_of_training_is_marked_as_whole_and_any_process_can_start_from_it(
    folder: Path, launcher: str
) -> None:
    checkpoint = folder / launcher / "gather" / "checkpoint-2"
    require_whole(checkpoint)
    files = json.loads((checkpoint / FILE_LIST).read_text())["files"]
    assert len([name for name in files if "rng_state" in name]) == (1 if launcher == "alone" else 2)
    loaded = AdaVTPForConditionalGeneration.from_pretrained(checkpoint)
    assert differing(weights_of(loaded), weights_in(folder / launcher / "gather")) == []
