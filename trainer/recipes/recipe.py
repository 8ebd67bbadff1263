"""A training run written down: a YAML file that says what is trained, on what, and how it is measured.

A recipe builds or loads a model and takes it through stages, one after another. Each stage leaves a checkpoint, so a
run that is interrupted goes on where it stopped.

```yaml
seed: 0
model: {checkpoint: llava-hf/llava-1.5-7b-hf}
stages:
  - name: budgets
    kind: conversations
    data: {path: my/conversations, split: train}
    budgets: {budget_range: [0.2, 1.0], per: sample}
    training: {max_steps: 2000, train_parts: [controller, projector]}
evaluation: {questions: 2400, budgets: [1.0, 0.4], reducers: [adaptive, random]}
```
"""

import math
import re
import reprlib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import TrainingArguments

from ...configuration.configuration_adavtp import reducer_entries
from ...hub_cards.training_record import check_record, check_types
from ...modeling.budget.token_budget import num_tokens_to_keep
from ...modeling.costs.model_costs import FULL
from ..adapters import ADAPTED_PARTS, QUANTIZATIONS
from ..data.budget_stream import BudgetStream
from ..training_arguments import AdaVTPTrainingArguments

_MOST_VALUES = 10_000
# Training arguments that the run says itself: where it writes, and what it goes on from.
OF_THE_RUN = ("output_dir", "resume_from_checkpoint")
# What recipes draw that name no task.
DEFAULT_TASK = "digit-scenes"
# The tower, the decoder and the projector by themselves, of drawn tasks.
KINDS_OF_PARTS = ("patch_labels", "told_questions", "told_patches", "shown_questions")
STAGE_KINDS = (*KINDS_OF_PARTS, "packed_questions", "conversations")
EVALUATION = {"questions": int, "budgets": list, "reducers": list}
# Of data with `sources`, the stream to train on and the rows to evaluate on; see stages.py.
SOURCE_FIELDS = {
    "data": ("sources", "max_length", "group_by_length", "block_size"),
    "eval_data": ("sources", "max_length"),
}
BUDGETS = {"budget_range": list[float], "per": str, "seed": int}
ADAPTER_FIELDS = {"r": int, "lora_alpha": float, "lora_dropout": float} | {
    **{"target_modules": list[str] | str | None, "quantize": str | None}
}


@dataclass
class Stage:
    """
    One stretch of training.

    Attributes:
        name: names the stage's folder.
        kind: one of `STAGE_KINDS`: `"patch_labels"` trains the tower alone (see [`PatchLabeller`]), `"told_questions"`
            the decoder ([`ToldReader`]), `"told_patches"` tower and projector ([`ToldProjector`]),
            `"shown_questions"` projector and decoder ([`ShownReader`]); `"packed_questions"` and `"conversations"`
            train what `train_parts` names.
        data: arguments of the stage's data set; its `path` names a drawn task, or for conversations what to read.
        eval_data: the same for the data set that `Trainer` evaluates on, if `training` asks it to.
        budgets: arguments of [`BudgetStream`]; empty for the full budget throughout.
        reducer: what chooses the visual tokens, as in `set_reducer`; `"random"` makes a model ready for any choice.
        gradient_gates: where the choice gets its gradient in this stage and those behind it, `"attention"` or
            `"features"`, as in [`AdaVTPConfig`]; `None` for no change.
        num_patches: for `"patch_labels"`, how many patches of each image the tower sees, see [`PatchLabeller`]; by
            default all.
        training: arguments of [`AdaVTPTrainingArguments`], or of `TrainingArguments` for a part alone.
        adapters: arguments of [`add_adapters`], such as `{"r": 16, "lora_alpha": 32}`, and `quantize`, `"nf4"` to have
            four-bit weights under them; empty to train the weights themselves. The stage leaves an adapter, and the
            next one starts from it merged.

    Raises:
        ValueError: if the kind is not known, or an argument of `budgets`, `training` or `adapters`; or a budget, or
            adapters here, are not allowed.
    """

    name: str
    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    eval_data: dict[str, Any] = field(default_factory=dict)
    budgets: dict[str, Any] = field(default_factory=dict)
    reducer: Any = "adaptive"
    gradient_gates: str | None = None
    num_patches: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_folder_name(self.name, "stage")
        if self.kind not in STAGE_KINDS:
            raise ValueError(f"stage {self.name!r}: `kind` is {self.kind!r}; allowed are {', '.join(STAGE_KINDS)}.")
        if self.gradient_gates not in (None, "attention", "features"):
            raise ValueError(
                f"stage {self.name!r}: `gradient_gates` is {self.gradient_gates!r}; allowed are 'attention', "
                "'features' and none."
            )
        if self.num_patches is not None and (self.kind != "patch_labels" or self.num_patches < 1):
            raise ValueError(
                f"stage {self.name!r}: `num_patches` is {self.num_patches}; a stage of kind 'patch_labels' may have a "
                "number from 1, others none."
            )
        of_training = TrainingArguments if self.kind in KINDS_OF_PARTS else AdaVTPTrainingArguments
        arguments = [f.name for f in fields(of_training) if f.name not in OF_THE_RUN]
        known = {"training": arguments, "budgets": BUDGETS, "adapters": ADAPTER_FIELDS}
        for group, names in known.items():
            _check_names(getattr(self, group), names, f"stage {self.name!r}, {group}")
        check_types(self.training, get_type_hints(of_training), f"stage {self.name!r}, training")
        check_types(self.budgets, BUDGETS, f"stage {self.name!r}, budgets")
        check_types(self.adapters, ADAPTER_FIELDS, f"stage {self.name!r}, adapters")
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
            if self.training.get(name, 1) < 1:
                raise ValueError(
                    f"stage {self.name!r}, training: `{name}` is {self.training[name]}; allowed are 1 and more."
                )
        if "hub_token" in self.training:
            raise ValueError(
                f"stage {self.name!r}, training: `hub_token` has no place in a recipe, which is published with the "
                "weights; set HF_TOKEN, or log in with `hf auth login`."
            )
        for group, names in SOURCE_FIELDS.items():
            if self.kind == "conversations" and "sources" in getattr(self, group):
                _check_names(getattr(self, group), names, f"stage {self.name!r}, {group}")
        # Now, and not when the stages before this one have run for hours.
        BudgetStream(**self.budgets)
        if self.adapters:
            self._check_adapters()

    def _check_adapters(self) -> None:
        quantize = self.adapters.get("quantize")
        if not isinstance(quantize, str | None) or quantize not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"stage {self.name!r}: `quantize` is {quantize!r}; allowed are {', '.join(QUANTIZATIONS)} and none."
            )
        # What trains where the recipe does not say is the decoder, among others.
        train_parts = self.training.get("train_parts", list(ADAPTED_PARTS))
        if self.kind in KINDS_OF_PARTS or not set(train_parts) & set(ADAPTED_PARTS):
            raise ValueError(
                f"stage {self.name!r}: `adapters` is {self.adapters}, with `kind` {self.kind!r} and `train_parts` "
                f"{train_parts}; adapters are for {' and '.join(ADAPTED_PARTS)} in the other kinds of stages."
            )


@dataclass
class Recipe:
    """
    A whole run.

    Attributes:
        model: `{"checkpoint": path or repository}`, of AdaVTP, LLaVA or another family, and beside it what
            `from_pretrained` takes, configuration fields among it; or the fields of an [`AdaVTPConfig`] for a new
            model, beside them `task`, the drawn task that it is for (digit scenes), `look_around: true` for a tower
            whose heads begin by looking at neighbours (see [`look_around`]), and `look_back: true` for a decoder whose
            heads begin by finding what is alike (see [`look_back`]).
        stages: what is done, in order.
        seed: of initialisation, of the order of data and of the budgets.
        reducer: what the last stage's checkpoint chooses tokens with, as in `set_reducer`, if not with what that stage
            trained. The weights of all reducers that were trained are in it.
        evaluation: what `adavtp train` measures at the end on the model's task: `questions`, the number of them,
            `budgets` and `reducers`; empty for nothing.

    Raises:
        ValueError: if there are no stages or two have the same name, or the model or the evaluation is not complete.
    """

    model: dict[str, Any]
    stages: list[Stage]
    seed: int = 0
    reducer: Any = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32 - len(self.stages):
            raise ValueError(f"`seed` is {self.seed}; allowed are whole numbers from 0 that 32 bits hold.")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`stages` are named {names}; a recipe has at least one, and no name twice.")
        if "checkpoint" not in self.model and not {"vision_config", "text_config"} <= set(self.model):
            raise ValueError(
                f"`model` has {', '.join(self.model) or 'no fields'}; it needs `checkpoint`, or `vision_config` and "
                "`text_config`."
            )
        if self.stages[0].adapters and "checkpoint" not in self.model:
            raise ValueError(
                f"stage {self.stages[0].name!r} is the first and has adapters, and `model` has no `checkpoint` that "
                "they could belong to; name one, or train a stage without adapters before."
            )
        if "checkpoint" not in self.model:
            check_types(
                self.model,
                {"vision_config": dict, "text_config": dict, "task": str, "look_around": bool, "look_back": bool},
                "model",
            )
            check_record(self.model["vision_config"], {"image_size": int, "patch_size": int}, "`vision_config`")
        check_types(self.model, {"checkpoint": str}, "model")
        if self.evaluation:
            _check_names(self.evaluation, EVALUATION, "evaluation", EVALUATION)
            check_types(self.evaluation, EVALUATION, "evaluation")
            if self.evaluation["questions"] < 1:
                raise ValueError(f"evaluation: `questions` is {self.evaluation['questions']}; allowed are 1 and more.")
            for budget in self.evaluation["budgets"]:
                num_tokens_to_keep(budget, num_tokens=576, batch_size=1)
        self.reducer_names()

    def reducer_names(self) -> set[str]:
        """Every reducer that a stage, the result or the evaluation asks for; `ValueError` if something is none."""
        chosen = [stage.reducer for stage in self.stages] + self.evaluation.get("reducers", [])
        chosen += [] if self.reducer is None else [self.reducer]
        entries = [entry for one in chosen if one != FULL for entry in reducer_entries(one)]
        return {entry if isinstance(entry, str) else entry["name"] for entry in entries}

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """
        Reads a recipe.

        Raises:
            ValueError: if a field is unknown, missing or of another type, or a stage's kind is not known.
        """
        content = read_yaml(path)
        # `stages:` with nothing behind it.
        content = {name: [] if name == "stages" and value is None else value for name, value in content.items()}
        check_fields(content, cls, str(path))
        for number, stage in enumerate(content["stages"]):
            check_fields(stage, Stage, f"{path}, stage {number}")
        return cls(**content | {"stages": [Stage(**stage) for stage in content["stages"]]})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields of a file; `ValueError` if it is no YAML, or has no fields, or one twice."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {reprlib.repr(content)}; expected are fields, `name: value`.")
    _require_plain(content, path)
    return content


def _require_plain(content: Any, path: str | Path) -> None:
    """That there is nothing but what JSON has, which it is noted in, and no more of it than anybody writes."""
    rest = [content]
    # An alias may stand for a list of aliases, and so for more than any memory holds, or for what it is part of.
    for _ in range(_MOST_VALUES):
        if not rest:
            return
        value = rest.pop()
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} has {value}; allowed are finite numbers.")
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{path} has {reprlib.repr(value)}, a {type(value).__name__}; write it in quotes.")
    raise ValueError(f"{path} has more than {_MOST_VALUES} values, aliases written out; a recipe has a few hundred.")


def require_folder_name(name: Any, of: str) -> None:
    """`ValueError` if a name would lead a folder out of the one that it lies in."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"{of} {name!r}: `name` names a folder of the run; allowed are letters, digits and _, and behind the "
            "first of them also . and -."
        )


class RecipeLoader(yaml.SafeLoader):
    """
    Reads `1e-3` as the number that everybody means; YAML 1.1, which PyYAML follows, takes it for a word. Refuses a
    name that comes twice, of which PyYAML forgets the first.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See [`yaml.SafeLoader`]."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number as it is meant: YAML 1.1 takes 010 for eight and 1:30 for ninety."""
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r} is no decimal number; write one, or quotes", node.start_mark
            )
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


# `<<: *defaults`, whose fields stand behind those that are written out.
MERGE = "tag:yaml.org,2002:merge"
for kind in ("int", "float"):
    RecipeLoader.add_constructor(f"tag:yaml.org,2002:{kind}", RecipeLoader.construct_number)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def check_fields(content: Any, of: type, where: str) -> None:
    """`ValueError` if a file's content has not the fields of a data class, in their types; `where` names the file."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: found {reprlib.repr(content)}; expected are fields, `name: value`.")
    needed = [f.name for f in fields(of) if f.default is MISSING and f.default_factory is MISSING]
    _check_names(content, [f.name for f in fields(of)], where, needed)
    # A name has a rule of its own, and what a list of other data classes holds is checked as theirs.
    types = {name: hint for name, hint in get_type_hints(of).items() if name != "name"}
    lists = {name for name, hint in types.items() if any(map(is_dataclass, get_args(hint)))}
    check_types(content, types | dict.fromkeys(lists, list | None), where)


def _check_names(content: dict[str, Any], known: Iterable[str], where: str, needed: Iterable[str] = ()) -> None:
    if unknown := sorted(map(str, set(content) - set(known))):
        raise ValueError(f"{where}: unknown field(s) {', '.join(unknown)}; allowed are {', '.join(known)}.")
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"{where}: missing field(s) {', '.join(missing)}.")
