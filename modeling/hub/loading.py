"""Loading that does not go on with half a model.

`from_pretrained` of transformers only prints a report where weights are missing and gives them random values. For a
model that starts from LLaVA that is right for the parts that LLaVA does not have. Anywhere else it means a broken file
or the wrong one, and the model would answer nonsense, so here it is an error.
"""

import json
from collections.abc import Iterable
from copy import copy
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .own_files import failures_in_words, require_own_files

TRAINED_TOGETHER = "budget_token and controller"
NEW_MODULES = ("budget_token", "controller", "reducers", "scheduler")

_SHOWN = 5


class CompleteLoadingMixin:
    """
    Gives a model class a `from_pretrained` that loads everything or says what is wrong.

    Attributes:
        readable_model_types: of the configurations that it reads.
    """

    readable_model_types: tuple[str, ...] = ("adavtp", "llava")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """
        Loads a model from a folder or the Hub. See [`PreTrainedModel.from_pretrained`] for all arguments.

        From a LLaVA checkpoint, which has neither budget token nor controller, those start from random values. Weights
        are read from safetensors files; pass `use_safetensors=False` for a checkpoint that has only pickles.

        Args:
            ignore_mismatched_sizes: give weights of another shape random values.
            output_loading_info: return a dictionary of missing, unexpected and mismatched keys as well. Whoever asks
                for it is told which weights start from random values or stay behind, so that it is no error then.

        Returns:
            The model in evaluation mode, or model and dictionary.

        Raises:
            ValueError: if the checkpoint is of another kind of model, lacks weights that a LLaVA has, has only a part
                of the weights of a new module or more than the configuration asks for, has weights of another shape,
                or names files outside of its folder; the message names them.
            OSError: if there is no configuration, there are no weights, or a weight file is cut off.
        """
        if not isinstance(config, PreTrainedConfig):
            with failures_in_words("checkpoint", config or pretrained_model_name_or_path):
                check_configuration(
                    cls.config_class, config or pretrained_model_name_or_path, kwargs, cls.readable_model_types
                )
        kwargs.setdefault("use_safetensors", True)
        require_own_files(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _sparing_new_modules(kwargs["quantization_config"])
        try:
            # Left to transformers, weights of another shape are an error that does not say which they are.
            with failures_in_words("checkpoint", pretrained_model_name_or_path):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *model_args,
                    config=config,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **kwargs,
                )
        except Exception as error:
            damage = damaged_file(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
            if damage is not None:
                raise OSError(damage) from error
            raise
        if not ignore_mismatched_sizes:
            _check_shapes(info["mismatched_keys"], pretrained_model_name_or_path)
        # Without a checkpoint there is none that could be half of one: the caller has the weights in hand.
        if not output_loading_info and pretrained_model_name_or_path is not None:
            check_completeness(model, info, pretrained_model_name_or_path)
        if any(new_module_of(name) == TRAINED_TOGETHER for name in info["missing_keys"]):
            model.config.untrained_controller = True
        if any(new_module_of(name) == "scheduler" for name in info["missing_keys"]):
            model.config.untrained_scheduler = True
        # Whoever may run the folder's code now may run its processor's when that is first needed.
        model.trusts_remote_code = bool(kwargs.get("trust_remote_code"))
        return (model, info) if output_loading_info else model


def _sparing_new_modules(quantization_config: Any) -> Any:
    """
    A copy that leaves the parts that LLaVA does not have as they are, beside those that it names or, where it names
    none, the head that transformers spares: they are small, are read outside their own forward, and decide.
    """
    quantization_config = copy(quantization_config)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(quantization_config, field):
            named = getattr(quantization_config, field)
            spared = ["lm_head"] if named is None else list(named)
            setattr(quantization_config, field, [*spared, *NEW_MODULES, *(f"model.{name}" for name in NEW_MODULES)])
    return quantization_config


def new_module_of(name: str) -> str | None:
    """
    Which new module, beyond LLaVA's, a parameter belongs to by its name, with or without a head: `TRAINED_TOGETHER`
    for budget token and controller, `"scheduler"`, `"reducers.<name>"`, or `None` for a parameter that LLaVA has.
    """
    parts = name.removeprefix("model.").split(".")
    if parts[0] in ("budget_token", "controller"):
        return TRAINED_TOGETHER
    if parts[0] == "scheduler":
        return "scheduler"
    return ".".join(parts[:2]) if parts[0] == "reducers" else None


def check_configuration(
    config_class: type[PreTrainedConfig],
    source: str | PathLike[str] | None,
    kwargs: dict[str, Any],
    readable: tuple[str, ...] = CompleteLoadingMixin.readable_model_types,
) -> None:
    """
    That a checkpoint's configuration is there and of a model that can be read.

    Raises:
        ValueError: if it is of another kind of model.
        OSError: if there is none.
    """
    # Where there is no file, transformers would build LLaVA-1.5-7B, its default, with random weights.
    hub_kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "model_type")}
    fields = {} if source is None else config_class.get_config_dict(source, **hub_kwargs)[0]
    if not isinstance(fields, dict):
        raise ValueError(f"The config.json in {str(source)!r} holds a {type(fields).__name__}, not a JSON object.")
    if not fields and find_adapter_config_file(source, subfolder=kwargs.get("subfolder", "")):
        return  # A PEFT adapter says itself which checkpoint it belongs to, and that one is loaded.
    if not fields:
        raise OSError(f"There is no config.json in {str(source)!r}; a checkpoint needs one beside its weights.")
    if fields.get("model_type") not in readable:
        raise ValueError(
            f"`model_type` is {fields.get('model_type')!r} in the configuration of {str(source)!r}; allowed are "
            f"{' and '.join(map(repr, readable))}."
        )


def family_class(source: str | PathLike[str] | None, kwargs: dict[str, Any]) -> type[PreTrainedModel] | None:
    """The class for a checkpoint of another family than LLaVA; `None` for LLaVA's, and where no other is known."""
    if source is None or isinstance(kwargs.get("config"), PreTrainedConfig):
        return None
    hub_kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "model_type")}
    with failures_in_words("checkpoint", source):
        fields = PreTrainedConfig.get_config_dict(kwargs.get("config") or source, **hub_kwargs)[0]
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type in (None, *CompleteLoadingMixin.readable_model_types):
        return None
    try:
        # A LLaVA's folder has no code of other families with it.
        families = import_module(f"{__name__.rsplit('.', 2)[0]}.modeling_families")
    except ModuleNotFoundError:
        return None
    return families.model_class_of(model_type)


def is_stock(source: str | PathLike[str], **hub_kwargs: Any) -> bool:
    """
    Whether a checkpoint is a family's as it was released: without the settings of a budget, and so without weights of
    what chooses.
    """
    with failures_in_words("checkpoint", source):
        fields = PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0]
    return fields.get("model_type") != "adavtp" and "controller_head" not in fields


def check_completeness(model: nn.Module, info: dict[str, Any], source: str | PathLike[str] | None) -> None:
    """
    That a checkpoint had the weights of a whole model and none of another controller.

    Args:
        model: that was loaded.
        info: what `from_pretrained` says with `output_loading_info=True`.
        source: the checkpoint, as errors name it.

    Raises:
        ValueError: if some are missing, or left; the message names them.
    """
    parameters = {name for name, _ in model.named_parameters()}
    _check_nothing_is_lost(set(info["missing_keys"]), parameters, source)
    _check_nothing_is_left(info["unexpected_keys"], source)


def _check_shapes(mismatched: Iterable[tuple[str, Any, Any]], source: str | PathLike[str] | None) -> None:
    if wrong := [f"`{name}` has {tuple(is_)}, expected {tuple(should)}" for name, is_, should in sorted(mismatched)]:
        raise ValueError(
            f"The weights in {str(source)!r} do not have the shapes that the configuration asks for: "
            f"{_first(wrong, '; ')}. Correct the configuration, or pass `ignore_mismatched_sizes=True` to give these "
            "weights random values."
        )


def _check_nothing_is_lost(missing: set[str], parameters: set[str], source: str | PathLike[str] | None) -> None:
    lost = {name for name in missing if new_module_of(name) is None}
    if lost:
        raise ValueError(
            f"{len(lost)} weight(s) that every checkpoint of this kind has are missing in {str(source)!r}: "
            f"{_first(sorted(lost))}. Expected are all of them, under these names or older ones; get the complete "
            "checkpoint."
        )
    for module in sorted({str(new_module_of(name)) for name in missing}):
        there = {name for name in parameters - missing if new_module_of(name) == module}
        absent = {name for name in missing if new_module_of(name) == module}
        if there:
            raise ValueError(
                f"{len(absent)} of the {len(there) + len(absent)} weight(s) of {module} are missing in "
                f"{str(source)!r}: {_first(sorted(absent))}. Expected are all (an AdaVTP checkpoint) or none of them "
                "(a checkpoint without a budget); load with the configuration that the checkpoint was trained with."
            )


def _check_nothing_is_left(unexpected: Iterable[str], source: str | PathLike[str] | None) -> None:
    """Weights of a reducer may stay behind, since another can be chosen; a controller without some is another one."""
    left = sorted(name for name in unexpected if new_module_of(name) == TRAINED_TOGETHER)
    if left:
        raise ValueError(
            f"{str(source)!r} has {len(left)} weight(s) of {TRAINED_TOGETHER} that the configuration has no place for"
            f": {_first(left)}. Expected are exactly those that it asks for; load with the configuration that the "
            "checkpoint was trained with."
        )


def _first(items: list[str], separator: str = ", ") -> str:
    return separator.join(items[:_SHOWN]) + (f"{separator}and {len(items) - _SHOWN} more" * (len(items) > _SHOWN))


def damaged_file(source: str | PathLike[str] | None, subfolder: str = "") -> str | None:
    """What is wrong with the first safetensors file of a local folder that is not whole, or `None`."""
    if source is None or not Path(source).is_dir():
        return None
    for path in sorted(Path(source, subfolder).glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(min(header_size, size))
        try:
            ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            return f"{str(path)!r} has {size} bytes and no readable safetensors header; copy or download it again."
        if size != (expected := 8 + header_size + max(ends, default=0)):
            return f"{str(path)!r} has {size} bytes, expected {expected}; it was cut off, copy or download it again."
    return None
