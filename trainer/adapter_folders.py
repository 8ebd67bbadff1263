"""Folders of adapters: saved in PEFT's layout, loaded with their base, merged into an ordinary checkpoint.

An adapter says what checkpoint it belongs to and is nothing without it. Beside PEFT's files lie the configuration that
it was trained with and the code of reducers that do not come with AdaVTP.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ..hub_cards.sound_weights import require_finite
from ..hub_cards.training_record import check_types, read_record
from ..modeling.hub.custom_reducers import CUSTOM_FILES, is_custom, load_custom_reducers, save_custom_reducers
from ..modeling.hub.loading import check_completeness, family_class, new_module_of
from ..modeling.hub.own_files import failures_in_words, require_own_files
from ..modeling.hub.saving import save_code
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.reducers.base import REDUCERS
from .trained_parts import adavtp_model_of

if TYPE_CHECKING:
    from peft import PeftModel

# The adapted model's configuration: its reducer and the like, which may not be the base's. By the name config.json
# transformers would take the folder for a whole checkpoint.
ADAPTED_CONFIG = "adavtp_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def save_beside_adapter(model: "PeftModel", folder: str | Path) -> None:
    """
    Completes a folder that PEFT saved: with the adapted model's configuration and the code of reducers that do not
    come with AdaVTP, and without a base model on the card that only this machine knows.
    """
    folder, base = Path(folder), model.get_base_model()
    (folder / ADAPTED_CONFIG).write_text(json.dumps(_config_to_keep(base.config), indent=2), encoding="utf-8")
    reducers = adavtp_model_of(base).reducers
    # A reducer may be inside a wrapper (PEFT), or its class one that sharding (FSDP) made on the spot.
    classes = {
        name: REDUCERS.get(name, type(getattr(reducer, "original_module", reducer)))
        for name, reducer in reducers.items()
    }
    if custom := {name: reducer_class for name, reducer_class in classes.items() if is_custom(reducer_class)}:
        save_code(type(base), folder)
        save_custom_reducers(custom, folder)
    _correct_card(folder / "README.md", model.active_peft_config.base_model_name_or_path)


def _config_to_keep(config: PreTrainedConfig) -> dict[str, Any]:
    """Without what is a matter of how the base was loaded."""
    content = config.to_dict()
    for fields in (content, content["text_config"], content["vision_config"]):
        for name in ("quantization_config", "dtype", "_name_or_path"):
            fields.pop(name, None)
    return content


def _correct_card(path: Path, base: str | None) -> None:
    from huggingface_hub import ModelCard

    if not path.is_file() or not (base is None or Path(base).exists()):
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    # The Hub takes repositories here and refuses paths.
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    card.save(path)


def load_adapter(
    adapter: str | Path, base: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> "PeftModel":
    """
    A base checkpoint with its adapter, as it was trained: with the reducer of then and everything else.

    Args:
        adapter: folder that [`AdaVTPTrainer`] wrote for a model with adapters, or one that PEFT wrote.
        base: folder or Hub repository of the checkpoint; by default what the adapter says, see [`base_of`].
        trust_remote_code: whether code that adapter and base bring may run, such as reducers of their own.
        kwargs: of `from_pretrained` for the base.

    Raises:
        ValueError: if there is no adapter in the folder, it does not fit the base, neither has some weights, or a file
            lies outside of its folder.
        OSError: if there is no base.
    """
    from peft import PeftModel

    adapter = Path(adapter)
    base = base_of(adapter) if base is None else base
    require_own_files(adapter)
    try:
        model_class = family_class(base, {}) or AdaVTPForConditionalGeneration
    except OSError as error:
        raise _no_base(adapter, base, error) from error
    if (adapter / ADAPTED_CONFIG).is_file():
        with failures_in_words("adapter", adapter):
            config = model_class.config_class(**read_record(adapter / ADAPTED_CONFIG, {}))
        if any((adapter / file).is_file() for file in CUSTOM_FILES):
            entries = [*config.reducers, *config.trained_reducers]
            names = [entry if isinstance(entry, str) else entry["name"] for entry in entries]
            load_custom_reducers(str(adapter), [name for name in names if name != "adaptive"], trust_remote_code)
        kwargs |= {"config": config}
    try:
        if "config" in kwargs:
            _require_same_sizes(kwargs["config"], model_class.config_class.from_pretrained(base), adapter, base)
        model, info = model_class.from_pretrained(
            base, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
        )
        check_completeness(model, info, base)
    except OSError as error:
        raise _no_base(adapter, base, error) from error
    try:
        with failures_in_words("adapter", adapter):
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except ValueError as error:
        if isinstance(error.__cause__, SafetensorError):
            raise OSError(
                f"{str(adapter / ADAPTER_WEIGHTS)!r} is not whole; copy or download it again. {error}"
            ) from error
        raise ValueError(f"The adapter {str(adapter)!r} does not fit {base!r}: {error}") from error
    _require_fit(adapted, adapter, base, set(info["missing_keys"]))
    if "config" in kwargs:
        # What the base lacks the adapter brings, as its own configuration says.
        model.config.untrained_controller = kwargs["config"].untrained_controller
    return adapted


def _no_base(adapter: Path, base: str, error: OSError) -> OSError:
    return OSError(
        f"The adapter {str(adapter)!r} belongs to {base!r}, which could not be loaded; name its base checkpoint "
        f"(`--base`). {error}"
    )


def base_of(adapter: str | Path) -> str:
    """
    The checkpoint that an adapter belongs to: a folder, or else taken for a Hub repository. Where a relative path does
    not lead anywhere from here, it is tried from the adapter's folder and from those above it.

    Raises:
        ValueError: if there is no adapter in the folder, or it does not say.
    """
    path = Path(adapter) / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"`adapter` is {str(adapter)!r}; expected is a folder with {ADAPTER_CONFIG} in it.")
    config = read_record(path, {})
    check_types(config, {"base_model_name_or_path": str | None}, str(path))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{str(path)!r} does not say which checkpoint the adapter belongs to; name it (`--base`).")
    if Path(base).is_dir():
        return base
    folders = (path.parent.resolve(), *path.parent.resolve().parents)
    return next((str(folder / base) for folder in folders if (folder / base).is_dir()), base)


def _require_same_sizes(adapted: PreTrainedConfig, config: PreTrainedConfig, adapter: Path, base: str) -> None:
    """That an adapter is not one of another model, of which a part would fit."""
    for part in ("text_config", "vision_config"):
        for name in SIZES:
            was, is_ = (getattr(getattr(of, part), name, None) for of in (adapted, config))
            if was != is_:
                raise ValueError(
                    f"The adapter {str(adapter)!r} does not fit {base!r}: it was trained on a model with `{name}` "
                    f"{was} in its `{part}`, and here it is {is_}. Name the checkpoint that it was trained on."
                )


def _require_fit(model: "PeftModel", adapter: Path, base: str, missing_in_base: set[str]) -> None:
    """That the adapter's weights are the model's, and that together with the base's they are all."""
    from peft import get_peft_model_state_dict

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        given = set(file.keys())
    expected = set(get_peft_model_state_dict(model))
    if given != expected:
        differing = sorted(given ^ expected)
        raise ValueError(
            f"The adapter {str(adapter)!r} does not fit {base!r}: {len(differing)} weight(s) are in only one of them, "
            f"{differing[0]} among them. Name the checkpoint that it was trained on."
        )
    brought = {name.removeprefix("base_model.model.") for name in given}
    absent = sorted(name for name in missing_in_base if new_module_of(name) is not None and name not in brought)
    if absent:
        raise ValueError(
            f"{len(absent)} weight(s), {absent[0]} among them, are neither in {base!r} nor in the adapter "
            f"{str(adapter)!r}; in training they had values from a random start, which nobody saved. Train on a "
            "checkpoint that has them: `adavtp convert` makes one from LLaVA's, `save_pretrained` one of a model with "
            "a new reducer."
        )


def merge_adapter(
    adapter: str | Path, output_dir: str | Path, base: str | None = None, trust_remote_code: bool = False
) -> Path:
    """
    Writes the ordinary checkpoint that a base and its adapter are together: W + (alpha / r) B A.

    The base is loaded in the precision that it is stored in, also if the adapter was trained over four bits of it:
    the adapter has learned to correct rounding that is then not there, which is small, and the merged weights have
    none.

    Args:
        adapter, base, trust_remote_code: see [`load_adapter`].
        output_dir: a folder that is new or empty. Nothing is in it unless everything could be written.

    Returns:
        `output_dir`, which loads like any checkpoint, without PEFT. It has the processor from the adapter's folder,
        or else the base's, and the training log of the former.

    Raises:
        ValueError: if `output_dir` has something in it, or a merged weight is not finite; and as [`load_adapter`]
            does.
        OSError: if there is no base.
    """
    adapter, output_dir = Path(adapter), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` is {str(output_dir)!r}, which has something in it; name a new folder.")
    base = base_of(adapter) if base is None else base
    adapted = load_adapter(adapter, base, trust_remote_code)
    merged = adapted.merge_and_unload()
    require_finite(merged.state_dict(), f"The sum of {base!r} and the adapter {str(adapter)!r}")
    has_processor = (adapter / "processor_config.json").is_file()
    source = str(adapter) if has_processor else base
    processor = merged.processor_class.from_pretrained(source, trust_remote_code=trust_remote_code)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that it moves into place by renaming.
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        folder = Path(temporary) / "merged"
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        for log in adapter.glob("training_log*.json"):
            shutil.copy(log, folder)
        folder.replace(output_dir)
    return output_dir
