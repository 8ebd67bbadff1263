"""From a LLaVA checkpoint to an AdaVTP folder, without ever holding a model.

Which tensor goes where, and that nothing is left over or left out, is settled from names and shapes alone. Then every
weight file is opened, its tensors are given their new names and written, and it is closed again: what is in memory is
at most one file, and the new modules, which join the last one. They get the values that `from_pretrained` would give
them. The folder appears when it is whole.
"""

import json
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from ...configuration.configuration_adavtp import AdaVTPConfig
from ...modeling.hub.loading import new_module_of
from ...modeling.hub.own_files import failures_in_words
from ...modeling.hub.saving import AUTO_MAP, without_auto_class
from ...modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..output_folder import folder_beside, require_output_folder
from ..sound_weights import require_finite
from .llava_files import checkpoint_folder, read_json, tensors_of
from .llava_names import LANGUAGE, Dropped, Layout, target_name
from .llava_original import ORIGINAL_MODEL_TYPES, read_original_checkpoint
from .llava_source import LlavaSource, read_transformers_checkpoint
from .llava_tokens import new_rows

RECORD = "conversion.json"
EMBEDDINGS, HEAD = f"{LANGUAGE}embed_tokens.weight", "lm_head.weight"
_SHOWN = 5

Progress = Callable[[list["Shard"]], Iterable["Shard"]]


class Shard(NamedTuple):
    """A weight file of the source with the layout of its names, and what each is called in the target."""

    path: Path
    layout: Layout
    names: dict[str, str]


@dataclass
class Conversion:
    """
    What was done.

    Attributes:
        source: repository id, or the folder's name.
        base: the same of what it was trained from, where its language model is taken from there.
        vision_tower: what `mm_vision_tower` named or was given in its place, of an original checkpoint.
        seed: of the new modules' values, and of the rows of tokens that were added.
        tensors, converted: how many were taken from the source, and how many of them changed their dtype.
        bytes, largest_file: of all weights and of the largest file.
        new_parameters: of the new modules, by module.
        new_rows: rows that the embeddings, and the head, have more than the source's.
        dropped_tensors, dropped_fields: what has no place in the target, with reasons.
        notes: what a user should know, a sentence each.
        peak_memory: bytes by which the process's resident size grew at most; pages of the source that were mapped and
            not yet given back are among them.
    """

    source: str
    base: str | None
    layout: Layout
    vision_tower: str | None
    seed: int
    dtype: str
    files: int
    tensors: int
    converted: int
    bytes: int
    largest_file: int
    new_parameters: dict[str, int]
    new_rows: int
    dropped_tensors: list[Dropped]
    dropped_fields: list[Dropped]
    notes: list[str]
    peak_memory: int


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    vision_tower: str | None = None,
    fields: dict[str, Any] | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    progress: Progress = iter,
    base: str | Path | None = None,
) -> Conversion:
    """
    Writes an AdaVTP folder with a LLaVA checkpoint's weights.

    The folder has the source's weight files with AdaVTP's names in them and the dtypes as they were, configuration,
    processor and code, so that `AutoModel.from_pretrained(output_dir, trust_remote_code=True)` loads it anywhere, and
    `conversion.json`, which is what this function returns.

    Args:
        source: folder or Hub repository: LLaVA or LLaVA-NeXT as transformers writes them, or as LLaVA's own code does.
        output_dir: where to write; a new or an empty folder, and not the current one.
        vision_tower: folder or repository of the CLIP tower of an original checkpoint; by default the one it names.
        fields: of [`AdaVTPConfig`], beyond those that LLaVA has, such as `{"budget_attention": "mutual"}`.
        chat_template: Jinja text in place of the source's, or of the one for its kind of model.
        seed: of the values of the new modules and rows.
        revision: of a repository.
        progress: wraps the list of files while they are written.
        base: folder or repository of the language model, or the LLaVA, that `source` was trained from, where that is
            an adapter or a projector alone.

    Returns:
        What was done.

    Raises:
        ValueError: if `output_dir` is not empty, or the source has a field or a tensor that the target cannot take, or
            lacks one that it needs, or has one with values that are not finite; the message names it.
        OSError: if the source is not there, or one of its files is damaged.
    """
    output_dir, memory = Path(output_dir).absolute(), _begin_peak()
    require_output_folder(output_dir)
    if output_dir.resolve() == Path.cwd():
        # A folder that is renamed takes its place, and whoever stands in the old one sees nothing.
        raise ValueError(f"`output_dir` is '{output_dir}', the current folder; allowed: another, new or empty.")
    folder = checkpoint_folder(str(source), revision=revision)
    base_folder = None if base is None else checkpoint_folder(str(base))
    with failures_in_words("checkpoint", str(source)):
        llava = _read_source(folder, fields or {}, vision_tower, base_folder, _own_name(str(source)), chat_template)
        model = _empty_model(llava)
    shards, dropped = _plan(llava, model)
    with folder_beside(output_dir) as temporary:
        folder = temporary / output_dir.name
        folder.mkdir()
        written = _write_weights(folder, llava, model, shards, seed, progress)
        _write_the_rest(folder, llava, model)
        done = Conversion(
            source=_public_name(str(source)),
            base=None if base is None else _public_name(str(base)),
            seed=seed,
            files=len(shards),
            dropped_tensors=dropped,
            peak_memory=_resident_size("VmHWM") - memory,
            **_of_source(llava),
            **written,
        )
        # What the folder says of its making is the same on every machine.
        record = {name: value for name, value in asdict(done).items() if name != "peak_memory"}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        folder.replace(output_dir)
    return done


def _of_source(llava: LlavaSource) -> dict[str, Any]:
    """What [`Conversion`] says of what was read."""
    return {
        "layout": llava.layout,
        "vision_tower": None if llava.vision_tower is None else _public_name(llava.vision_tower),
        "dtype": str(llava.config.dtype).removeprefix("torch."),
        "dropped_fields": llava.dropped,
        "notes": [note for note in (llava.template_note, *llava.notes) if note is not None],
    }


def _public_name(checkpoint: str) -> str:
    """A repository's id as it is, a folder's name without the way to it."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def _own_name(checkpoint: str) -> str:
    """What LLaVA's code takes for a model's name: of a run's checkpoint, also the run's."""
    path = Path(checkpoint).resolve() if Path(checkpoint).is_dir() else Path(checkpoint)
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name


def _read_source(
    folder: Path,
    fields: dict[str, Any],
    vision_tower: str | None,
    base: Path | None,
    name: str,
    chat_template: str | None,
) -> LlavaSource:
    file = folder / "config.json"
    if not file.is_file():
        raise OSError(f"There is no config.json in {str(folder)!r}; a checkpoint needs one beside its weights.")
    said = read_json(file)
    kind = said.get("model_type")
    if kind in ORIGINAL_MODEL_TYPES and ("mm_vision_tower" in said or kind != "llava"):
        return read_original_checkpoint(folder, fields, vision_tower, base, name, chat_template)
    if kind not in ("llava", "llava_next"):
        allowed = ", ".join(map(repr, ("llava", "llava_next", *ORIGINAL_MODEL_TYPES[1:])))
        raise ValueError(f"`model_type` is {kind!r} in {str(file)!r}; allowed are {allowed}.")
    if base is not None:
        raise ValueError(
            f"`base` is {str(base)!r}, and the source is a {kind!r} model as transformers writes it; it is for an "
            "adapter or a projector alone that LLaVA's own code left."
        )
    if vision_tower is not None:
        raise ValueError(
            f"`vision_tower` is {vision_tower!r}, and the source has its own tower's weights; it is for folders of "
            "LLaVA's own code, which may lack them."
        )
    return read_transformers_checkpoint(folder, fields, chat_template)


def _embeddings(llava: LlavaSource) -> torch.Tensor:
    """The source's input embeddings, `[vocab_size, hidden_size]`."""
    for path, layout in llava.files:
        for name, tensor in tensors_of(path).items():
            if target_name(name, layout) == EMBEDDINGS:
                return tensor
    raise ValueError(f"The source has no tensor for `{EMBEDDINGS}`; a LLaVA checkpoint has its input embeddings.")


def _empty_model(llava: LlavaSource) -> AdaVTPForConditionalGeneration:
    """The target without values, in the target's dtype."""
    if llava.config.dtype is None:
        llava.config.dtype = _embeddings(llava).dtype
    with torch.device("meta"):
        return AdaVTPForConditionalGeneration._from_config(llava.config)


def _plan(llava: LlavaSource, model: AdaVTPForConditionalGeneration) -> tuple[list[Shard], list[Dropped]]:
    """
    Where every tensor of the source goes.

    Raises:
        ValueError: if one has no place, another shape than its place, or a place that is taken; or if a place stays
            empty that is not a new module's.
    """
    tied = model.all_tied_weights_keys
    expected = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if new_module_of(name) is None
    }
    of_words = {name: (llava.vocab_size, *expected[name][1:]) for name in (EMBEDDINGS, HEAD)}
    shards, dropped, filled = [], [], {}
    for path, layout in llava.files:
        names = {}
        for name, tensor in sorted(tensors_of(path).items()):
            target = target_name(name, layout)
            if isinstance(target, str) and target in tied:
                target = _dropped_as_tied(name, tensor, llava)
            if isinstance(target, Dropped):
                dropped.append(target)
                continue
            where = f"{path.name!r} of the source has the tensor `{name}`"
            if target not in expected:
                raise ValueError(f"{where}, for which a LLaVA of its configuration has no place.")
            if target in filled and layout != "adapter" and filled[target][1] == "adapter":
                dropped.append(Dropped(name, "the source has its own in place of the base's"))
                continue
            if target in filled:
                raise ValueError(
                    f"{where}, and `{filled[target][0]}` is the same tensor of the model; expected is one of them."
                )
            shape = of_words.get(target, expected[target])
            if not tensor.is_floating_point():
                raise ValueError(f"{where} of {tensor.dtype}; weights are floating-point numbers.")
            if tensor.shape != shape:
                raise ValueError(f"{where} of shape {tuple(tensor.shape)}; its configuration asks for {shape}.")
            filled[target], names[name] = (name, layout), target
        if names:
            shards.append(Shard(path, layout, names))
    for name, change in llava.changes.items():
        if name not in filled or change.shape != of_words.get(name, expected[name]):
            place = f"is {tuple(expected[name])}" if name in expected else "has no place"
            raise ValueError(
                f"The source's adapter has weights for `{name}` of shape {change.shape}, which in a LLaVA of its "
                f"configuration {place}."
            )
    if empty := [name for name in expected if name not in filled and name not in tied]:
        raise ValueError(
            f"The source lacks {len(empty)} tensor(s) that every LLaVA checkpoint has, in AdaVTP's names "
            f"{', '.join(empty[:_SHOWN])}; get the complete checkpoint."
        )
    return shards, dropped


def _dropped_as_tied(name: str, tensor: torch.Tensor, llava: LlavaSource) -> Dropped:
    if not torch.equal(tensor, _embeddings(llava)):
        raise ValueError(
            f"`tie_word_embeddings` is True in the source's configuration, and its `{name}` differs from its input "
            "embeddings; expected is the same tensor, or the field False."
        )
    return Dropped(name, "is the input embeddings (tie_word_embeddings)")


def _write_weights(
    folder: Path,
    llava: LlavaSource,
    model: AdaVTPForConditionalGeneration,
    shards: list[Shard],
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the weight files and their index; returns the figures of [`Conversion`]."""
    new, rows = _new_tensors(model, seed), _rows_to_add(llava, seed)
    place, sizes, converted = {}, {}, 0
    for number, shard in enumerate(progress(shards), start=1):
        source = tensors_of(shard.path)
        tensors = {target: source[name] for name, target in shard.names.items()}
        if shard.layout in ("adapter", "clip"):
            converted += sum(tensor.dtype != llava.config.dtype for tensor in tensors.values())
            tensors = {target: tensor.to(llava.config.dtype) for target, tensor in tensors.items()}
        for target in llava.changes.keys() & tensors.keys():
            tensors[target] = llava.changes[target].added_to(tensors[target])
        for target in rows.keys() & tensors.keys():
            tensors[target] = torch.cat([tensors[target], rows[target].to(tensors[target].dtype)])
        require_finite(tensors, f"{shard.path.name!r} of the source")
        if number == len(shards):
            tensors |= new
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {target: tensor.contiguous() for target, tensor in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, name)
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
        # A file is given back before the next is opened.
        del source, tensors
    total = sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    new_parameters = Counter()
    for name, tensor in new.items():
        new_parameters[str(new_module_of(name))] += tensor.numel()
    return {
        "tensors": sum(len(shard.names) for shard in shards),
        "converted": converted,
        "bytes": total,
        "largest_file": max(sizes.values()),
        "new_parameters": dict(new_parameters),
        "new_rows": llava.config.text_config.vocab_size - llava.vocab_size,
    }


def _new_tensors(model: AdaVTPForConditionalGeneration, seed: int) -> dict[str, torch.Tensor]:
    """
    The new modules' tensors by name, with the values that `from_pretrained` gives to what a checkpoint lacks.

    They alone get memory; all others stay without, marked as loaded, which is how transformers tells them apart.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if new_module_of(name) is None:
            tensor._is_hf_initialized = True
            continue
        module_name, _, own_name = name.rpartition(".")
        module, values = model.get_submodule(module_name), torch.empty_like(tensor, device="cpu")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        setattr(module, own_name, torch.nn.Parameter(values, tensor.requires_grad) if is_parameter else values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
    return {name: tensor for name, tensor in model.state_dict().items() if new_module_of(name) is not None}


def _rows_to_add(llava: LlavaSource, seed: int) -> dict[str, torch.Tensor]:
    """New tokens' rows of the embeddings and, where it is not tied to them, the head; see [`new_rows`]."""
    num_new = llava.config.text_config.vocab_size - llava.vocab_size
    if num_new == 0:
        return {}
    embeddings, generator = _embeddings(llava), torch.Generator().manual_seed(seed)
    return {name: new_rows(embeddings, num_new, generator) for name in (EMBEDDINGS, HEAD)}


def _write_the_rest(folder: Path, llava: LlavaSource, model: AdaVTPForConditionalGeneration) -> None:
    """Configuration, generation's defaults, code and processor."""
    config: AdaVTPConfig = model.config
    config.auto_map, config.architectures = AUTO_MAP, [type(model).__name__]
    config.untrained_controller = True
    with without_auto_class(type(config)):
        config.save_pretrained(folder)
    if llava.generation:
        # As it is: transformers refuses to write some of what published checkpoints have.
        text = json.dumps(llava.generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    model.save_code(folder)
    llava.processor.save_pretrained(folder)


def _begin_peak() -> int:
    """Begins to watch the process's resident size; returns what it is, in bytes."""
    # Where this is not allowed, the largest size since the process began will count.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _resident_size("VmRSS")


def _resident_size(field: str) -> int:
    """`"VmRSS"`: the process's resident size; `"VmHWM"`: the largest that it has had. In bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)[1])
    # Systems without it tell only the largest.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
