"""An experiment written down: which checkpoints, trained how, are asked what, and what is compared with what.

An experiment is a YAML file of parts. A part compares reducers on a checkpoint as it is, or variants: each a short
training of its own that starts from the checkpoint, evaluated with what it trained. Everything is resumable: stages of
training leave checkpoints, evaluations go on where they stopped.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from ..evaluation.circumstances import checkpoint_hash, checkpoint_name
from ..evaluation.runs import PICTURES, Run
from ..evaluation.settings import (
    COMPUTE,
    CONTROLLER,
    FULL,
    TOKENS,
    budget_of_text,
    num_keep_of,
    reducer_label,
    reducer_of_text,
)
from ..hub_cards.training_record import check_types, read_record
from ..modeling.decoder.dials import require_rule
from ..modeling.processing_adavtp import AdaVTPProcessor
from ..trainer.recipes.recipe import Recipe, Stage, check_fields, read_yaml, require_folder_name
from ..trainer.recipes.run import run_recipe
from .console import REFERENCES
from .evaluate import evaluate_checkpoint

NEW_MODULES = (".controller.", ".budget_token.", ".reducers.")
START, START_IS_WHOLE = "start", "processor_config.json"
CHANGED = "changed"
CHECKPOINT = "checkpoint.json"
# Fields of a variant.
VARIANT = {"model": dict[str, Any], "training": dict[str, Any], "reducer": Any, "trained_as": str}
# Of visual tokens, where it is only asked whether a budget is one.
ANY_NUMBER = 576


@dataclass
class Part:
    """
    One question of an experiment.

    Attributes:
        name: names its folder.
        asks: the question, in words.
        against: the reducer or variant that the others are compared with.
        questions: how many examples are answered.
        reducers: what is compared on each checkpoint as it is, as on the command line.
        stage: how every variant trains: the fields of a recipe's [`Stage`] but its name.
        variants: what is compared otherwise, by name: `model`, fields of the configuration that differ; `training`,
            the stage's training arguments that do; and `reducer`, what chooses in the variant's training and
            evaluation, by default the controller. Or `trained_as`, another part's variant, `"part/variant"`: nothing
            is trained anew, and `model` are fields that differ in the evaluation alone.
        controls: reducers that the variants are compared with on the checkpoint as it is, as on the command line.
        rules: of `UNIT_RULES`; the same for what chooses the decoder's units, with the controller.
        fresh_controller: whether the variants' controllers start from random values and not from the checkpoint's.
        budgets, seeds: see [`Experiment`]; by default the experiment's.

    Raises:
        ValueError: if it has neither reducers nor variants, or both; or variants that train and no stage; if its name
            is no folder's, there are no questions, a stage is not allowed, or `against` is not measured.
    """

    name: str
    asks: str
    against: str
    questions: int
    reducers: list[str] = field(default_factory=list)
    stage: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    controls: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    fresh_controller: bool = False
    budgets: list[str | float | int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_folder_name(self.name, "part")
        if self.questions < 1:
            raise ValueError(f"part {self.name!r}: `questions` is {self.questions}; allowed are numbers from 1.")
        trains = any("trained_as" not in variant for variant in self.variants.values())
        if bool(self.reducers) == bool(self.variants) or trains != bool(self.stage):
            raise ValueError(
                f"part {self.name!r} has `reducers` {self.reducers}, `variants` {list(self.variants)} and `stage` "
                f"{self.stage}; it needs reducers alone, or variants and a stage by which they train."
            )
        if self.stage:
            check_fields({"name": self.name} | self.stage, Stage, f"part {self.name!r}, stage")
        for name, variant in self.variants.items():
            where = f"part {self.name!r}, variant {name!r}"
            if unknown := sorted(set(variant) - set(VARIANT)):
                raise ValueError(f"{where}: unknown field(s) {', '.join(unknown)}; allowed are {', '.join(VARIANT)}.")
            check_types(variant, VARIANT, where)
            if "trained_as" not in variant:
                self.stage_of(name)
            elif more := sorted(set(variant) - {"trained_as", "model"}):
                raise ValueError(f"{where}: it has `trained_as` and {', '.join(more)}; allowed beside it is `model`.")
        for rule in self.rules:
            require_rule(rule)
        names = [
            *self.variants,
            *self.rules,
            *(reducer_label(reducer_of_text(one)) for one in [*self.reducers, *self.controls]),
        ]
        if self.against not in (FULL, *names):
            raise ValueError(
                f"part {self.name!r}: `against` is {self.against!r}, which is not measured; allowed are "
                f"{', '.join(names)}."
            )

    def stage_of(self, variant: str) -> Stage:
        """How a variant trains."""
        settings = self.variants[variant]
        training = self.stage.get("training", {}) | settings.get("training", {})
        reducer = settings.get("reducer", "adaptive")
        return Stage(name=self.name, **{"reducer": reducer} | self.stage | {"training": training})


@dataclass
class Experiment:
    """
    An experiment.

    Attributes:
        title: of its report.
        data: the drawn task whose questions are asked.
        budgets: what the answers are asked at: fractions, numbers of tokens, or `"115/576"`, the fraction that keeps
            115 of 576 and as large a share of another number.
        parts: its questions.
        seeds: of the variants' training, which is done once with each.
        kinds: the kinds of question that are asked, by default all of the task's.
        dial: what the budgets are of, `"token_budget"` or `"compute_budget"`.

    Raises:
        ValueError: if `data` is no drawn task, `dial` is no dial, there are no seeds, or one twice, or a variant is to
            be trained as one that there is not.
    """

    title: str
    data: str
    budgets: list[str | float | int]
    parts: list[Part]
    seeds: list[int] = field(default_factory=lambda: [0])
    kinds: list[str] | None = None
    dial: str = TOKENS

    def __post_init__(self) -> None:
        if self.dial not in (TOKENS, COMPUTE):
            raise ValueError(f"`dial` is {self.dial!r}; allowed are {TOKENS!r} and {COMPUTE!r}.")
        if self.data not in REFERENCES:
            raise ValueError(f"`data` is {self.data!r}; allowed are {', '.join(REFERENCES)}.")
        for part in self.parts:
            part.budgets, part.seeds = part.budgets or self.budgets, part.seeds or self.seeds
            if not part.seeds or len(set(part.seeds)) < len(part.seeds):
                raise ValueError(
                    f"part {part.name!r}: `seeds` is {part.seeds}; allowed are one or more numbers, none twice."
                )
            for variant in part.variants:
                self.training_of(part, variant)

    def training_of(self, part: Part, variant: str) -> tuple[Part, str]:
        """The part and variant whose training a variant has: its own, or the one that it names."""
        name = part.variants[variant].get("trained_as")
        if name is None:
            return part, variant
        trained = {
            f"{other.name}/{own}": (other, own)
            for other in self.parts
            for own, settings in other.variants.items()
            if "trained_as" not in settings
        }
        if name not in trained:
            raise ValueError(
                f"part {part.name!r}, variant {variant!r}: `trained_as` is {name!r}; allowed are {', '.join(trained)}."
            )
        return trained[name]

    @classmethod
    def from_file(cls, path: str | Path) -> "Experiment":
        """Reads an experiment; `ValueError` if a field is unknown, missing or of another type, or a part twice."""
        content = read_yaml(path)
        check_fields(content, cls, str(path))
        parts = content["parts"] or []
        for number, part in enumerate(parts):
            check_fields(part, Part, f"{path}, part {number}")
        experiment = cls(**content | {"parts": [Part(**part) for part in parts]})
        for part in experiment.parts:
            for budget in part.budgets:
                num_keep_of(budget_of_text(str(budget)), ANY_NUMBER)
        names = [part.name for part in experiment.parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{path}: `parts` are named {names}; an experiment has at least one, and no name twice.")
        return experiment


def named_experiments() -> dict[str, Path]:
    """The experiments that come with the package, by the name that `adavtp experiment` takes."""
    folder = Path(__file__).parents[1] / "experiments"
    return {path.stem.removeprefix("experiment_"): path for path in sorted(folder.glob("experiment_*.yaml"))}


def write_start(checkpoint: str | Path, folder: Path) -> Path:
    """
    Writes a checkpoint without what was trained for choosing: the LLaVA in it, from which variants of the controller
    start. Returns `folder`; `ValueError` if the checkpoint has no weights in safetensors files.
    """
    if (folder / START_IS_WHOLE).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        weights |= load_file(path)
    llava = {name: tensor for name, tensor in weights.items() if not any(part in f".{name}" for part in NEW_MODULES)}
    if not llava:
        raise ValueError(f"`checkpoint` {checkpoint} has no weights in safetensors files.")
    save_file(llava, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("reducers", "trained_reducers", "auto_map")}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    # Written last: a folder without it is not whole.
    AdaVTPProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def folder_of_variant(folder: Path, seed: int, variant: str) -> Path:
    """Of a part's `folder`, where a variant's training and answers lie."""
    return folder / f"seed_{seed}" / re.sub(r"[^\w+-]+", "_", variant)


def train_variant(part: Part, variant: str, seed: int, checkpoint: str | Path, folder: Path) -> Path:
    """Trains one variant of a part from a checkpoint's folder, or finds it trained; the folder of the result."""
    settings = part.variants[variant]
    start = write_start(checkpoint, folder / START) if part.fresh_controller else checkpoint
    model = {"checkpoint": str(start)} | settings.get("model", {})
    return run_recipe(Recipe(model=model, stages=[part.stage_of(variant)], seed=seed), folder)


def with_fields(checkpoint: Path, fields: dict[str, Any], folder: Path) -> Path:
    """A checkpoint with some other fields in its configuration: a folder of hard links to its other files."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            (folder / path.name).hardlink_to(path)
    config = json.loads((checkpoint / "config.json").read_text()) | fields
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def evaluate_part(experiment: Experiment, part: Part, checkpoint: str, folder: Path, command: str) -> list[Run]:
    """
    The answers of one checkpoint to one part's questions.

    Args:
        checkpoint: folder or Hub repository.
        folder: for the runs, and for the variants' training; beside it lie those of other parts.
        command: that asked for it.

    Returns:
        The run; of variants for each seed one that joins their runs, with a variant's name where a reducer's would be.

    Raises:
        ValueError: if the folder was begun with another checkpoint, or a reducer or budget is not allowed.
    """
    about = {"checkpoint": checkpoint_name(checkpoint), "checkpoint_hash": checkpoint_hash(checkpoint)}
    for name in (part.name, *(experiment.training_of(part, variant)[0].name for variant in part.variants)):
        _require_same(about, folder.with_name(name))
    if not Path(checkpoint).is_dir():
        checkpoint = snapshot_download(checkpoint)

    def run_of(checkpoint: str | Path, reducers: Sequence[Any], output: Path, rule: str | None = None) -> Run:
        return evaluate_checkpoint(
            *(str(checkpoint), experiment.data, [budget_of_text(str(budget)) for budget in part.budgets]),
            reducers=[reducer_of_text(one) if isinstance(one, str) else one for one in reducers],
            dial=experiment.dial,
            scheduler=rule,
            output=output,
            questions=part.questions,
            kinds=experiment.kinds,
        )

    if part.reducers:
        return [run_of(checkpoint, part.reducers, folder / "run")]
    controls = {name: run_of(checkpoint, [name], folder / "controls" / name / "run") for name in part.controls}
    for rule in part.rules:
        controls[rule] = run_of(checkpoint, [CONTROLLER], folder / "rules" / rule / "run", rule)
    joined = []
    for seed in part.seeds:
        runs = {}
        for name, settings in part.variants.items():
            own, (as_part, as_variant) = folder_of_variant(folder, seed, name), experiment.training_of(part, name)
            of_training = folder_of_variant(folder.with_name(as_part.name), seed, as_variant)
            trained = train_variant(as_part, as_variant, seed, checkpoint, of_training)
            if "trained_as" in settings:
                trained = with_fields(trained, settings.get("model", {}), own / CHANGED)
            runs[name] = run_of(trained, [as_part.stage_of(as_variant).reducer], own / "run")
        about_seed = _of_seed(about, seed) | {"command": command}
        joined.append(join_variants(runs | controls, folder / f"seed_{seed}" / "run", about_seed))
    return joined


def _of_seed(about: dict[str, str], seed: int) -> dict[str, str]:
    """What is said of a checkpoint and one seed of training: reports tell them apart as they do checkpoints."""
    return {
        "checkpoint": f"{about['checkpoint']}, seed {seed}",
        "checkpoint_hash": f"{about['checkpoint_hash']}-{seed}",
    }


def join_variants(runs: Mapping[str, Run], folder: str | Path, about: Mapping[str, Any]) -> Run:
    """
    Writes the run that several variants' runs are together, in which a variant stands where a reducer would.

    Args:
        runs: of each variant, by its name; each has one reducer, which chose in that variant.
        folder: for the joined run; what is there of an earlier one is replaced.
        about: what the header says in place of what the variants' headers do: above all the checkpoint that all of
            them started from, `checkpoint` and `checkpoint_hash`.

    Raises:
        ValueError: if a run has several reducers, or the runs are not of the same questions.
    """
    first = next(iter(runs.values()))
    header = first.header | dict(about) | {"settings": [], "unreachable": []}
    for name, run in runs.items():
        reducers = {setting["reducer"] for setting in run.header["settings"]}
        if len(reducers) > 1:
            raise ValueError(f"The run of variant {name!r} has the reducers {sorted(reducers)}; it has to have one.")
        for fact in ("data_hash", "metric", "num_examples", "num_patches", "num_layers"):
            if run.header[fact] != header[fact]:
                raise ValueError(
                    f"The run of variant {name!r} has {fact} {run.header[fact]!r}, another has {header[fact]!r}; "
                    "variants are compared on the same questions."
                )
        for entries in ("settings", "unreachable"):
            header[entries] = header[entries] + [entry | {"reducer": name} for entry in run.header[entries]]
    for seconds in ("seconds", "model_seconds", "evaluation_seconds"):
        header[seconds] = sum(run.header[seconds] for run in runs.values())
    shutil.rmtree(folder, ignore_errors=True)
    joined = Run(folder, header)
    joined.write_header()
    shutil.copytree(first.folder / PICTURES, joined.folder / PICTURES)
    joined.write(replace(answer, reducer=name) for name, run in runs.items() for answer in run.answers())
    return joined


def _require_same(about: dict[str, str], folder: Path) -> None:
    """That what is in a folder belongs to this checkpoint; a new folder is marked as its own."""
    path = folder / CHECKPOINT
    if path.is_file():
        if read_record(path, dict.fromkeys(about, str)) != about:
            raise ValueError(
                f"{folder} was begun with another checkpoint, which {CHECKPOINT} there names; choose another folder "
                "with --work, or delete that one."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} has something in it and no {CHECKPOINT} that says with which checkpoint it was begun; choose "
            "another folder with --work, or delete that one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about))
