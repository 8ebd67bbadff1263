"""A saved folder that carries its own code.

`save_pretrained` writes the Python files that a checkpoint needs beside its weights, flat, and an `auto_map` that
tells `AutoModel.from_pretrained(folder, trust_remote_code=True)` where to look, so that the folder loads where this
package is not installed. A model loaded from such a folder runs from those files, and saving it writes them again.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)(\.+)([\w.]*)(\s+import\s)", re.MULTILINE)

# Folders whose files travel with a checkpoint.
ROOMS = ("modeling", "configuration")

AUTO_MAP = {
    "AutoConfig": "configuration_adavtp.AdaVTPConfig",
    "AutoModel": "modeling_adavtp.AdaVTPForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_adavtp.AdaVTPForConditionalGeneration",
    "AutoProcessor": "processing_adavtp.AdaVTPProcessor",
}


def code_files(entry: Path) -> dict[str, str]:
    """
    The file `entry` and every file that it imports relatively, directly or not, as they stand in a flat folder.

    Args:
        entry: a Python file, in the package's tree or in a flat folder.

    Returns:
        File name -> content, with every relative import rewritten to `from .module import ...`.
    """
    waiting, sources = [entry.resolve()], {}
    while waiting:
        path = waiting.pop()
        if flat_name(path) in sources:
            continue
        text = path.read_text(encoding="utf-8")

        def imported(match: re.Match, path: Path = path) -> Path:
            folder = path.parents[len(match[2]) - 1]
            return folder.joinpath(*match[3].split(".")).with_suffix(".py").resolve()

        waiting += [imported(match) for match in _RELATIVE_IMPORT.finditer(text)]
        flat = _RELATIVE_IMPORT.sub(
            lambda match, imported=imported: f"{match[1]}.{flat_name(imported(match))[:-3]}{match[4]}", text
        )
        sources[flat_name(path)] = (path, flat)
    return {name: flat for name, (_, flat) in sorted(sources.items())}


def flat_name(path: Path) -> str:
    """The name of a file of a room in a flat folder: `modeling/reducers/tome.py` becomes `reducers_tome.py`."""
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file() and folder.name not in ROOMS:
        parts.append(folder.name)
        folder = folder.parent
    return "_".join(reversed(parts)) + ".py"


def own_class(cls: type) -> type:
    """
    The class whose code a folder carries: `cls`, or its nearest base class among the files that `AUTO_MAP` names.

    A subclass made on the spot, as sharding (FSDP) and notebooks do, has no file that could go into a folder.
    """
    modules = {reference.partition(".")[0] for reference in AUTO_MAP.values()}
    return next(base for base in cls.__mro__ if base.__module__.rpartition(".")[2] in modules)


def save_code(cls: type, folder: Path) -> None:
    """Writes the file that defines `cls` (see `own_class`), and the files it needs, into `folder`."""
    for name, text in code_files(Path(sys.modules[own_class(cls).__module__].__file__)).items():
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def without_auto_class(cls: type) -> Iterator[None]:
    """Keeps transformers from saving code its own way, which looks for every imported file in the same folder."""
    own = cls.__dict__.get("_auto_class")
    cls._auto_class = None
    try:
        yield
    finally:
        cls._auto_class = own


class SelfContainedMixin:
    """Gives a model class a `save_pretrained` whose folder stands alone."""

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """
        Saves weights (safetensors), configuration and code. See [`PreTrainedModel.save_pretrained`] for the arguments.

        The weights keep the names that the model has in memory, which stock LLaVA reads as well; in the older names
        that transformers writes for LLaVA by default, `Trainer` could not resume from them.
        """
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = AUTO_MAP | {"AutoModel": f"modeling_adavtp.{own_class(type(self)).__name__}"}
        if getattr(getattr(self, "generation_config", None), "token_budget", None) is not None:
            # Marked as derived from the model's configuration, it would be read without fields that are only ours.
            self.generation_config._from_model_config = False
        with without_auto_class(type(self)), without_auto_class(type(self.config)):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.save_code(Path(save_directory))

    def save_code(self, folder: Path) -> None:
        """Writes the model's code into `folder`."""
        save_code(type(self), folder)

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        # With `push_to_hub=True` transformers uploads the folder before the code would be written.
        self.save_code(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)
