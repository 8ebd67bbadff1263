"""Reducers of a user in a saved folder.

A checkpoint may be made for reducers that do not come with AdaVTP. Their code goes into the folder in one file,
`adavtp_code/reducers_custom.py`, which in the package itself is empty. Where the package is absent, the folder's model
imports it; where it is installed, it runs as a module of the package when somebody trusts the folder's code.
"""

import hashlib
import importlib
import importlib.util
import sys
from functools import cache
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_cached_module_file, get_relative_imports
from transformers.utils import HF_MODULES_CACHE

from ...configuration.configuration_adavtp import reducer_entries
from ..reducers.base import REDUCERS, TokenReducer, register_reducer
from ..reducers.custom import CUSTOM_REDUCERS
from ..reducers.published import PUBLISHED_REDUCERS
from .class_source import FlatSource
from .own_files import failures_in_words
from .saving import CODE_FOLDER, PACKAGE, code_paths, module_name

CUSTOM = "reducers_custom"
# Files that may bring reducers, with the name of the dictionary in each.
CUSTOM_FILES = {f"{CODE_FOLDER}/{CUSTOM}.py": "CUSTOM_REDUCERS", "own_reducers_adavtp.py": "OWN_REDUCERS"}
# Modules here are called as they are in a saved folder.
_FLAT = f"{PACKAGE}.{CODE_FOLDER}"
_HEADER = '"""Reducers of this checkpoint that do not come with AdaVTP, by name. Saving a model writes this file."""'
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")


class CustomReducersMixin:
    """Gives a model class folders that bring the user's reducers with them. It stands before `SelfContainedMixin`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """
        Loads a model, and with `trust_remote_code=True` the reducers that its folder brings.

        Raises:
            ValueError: if the configuration names a reducer that is registered neither here nor there.
        """
        with failures_in_words("checkpoint", config or pretrained_model_name_or_path):
            names = _names_in_use(cls.config_class, pretrained_model_name_or_path, config, kwargs)
        load_custom_reducers(pretrained_model_name_or_path, names, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def save_code(self, folder: Path) -> None:
        """Writes the model's code, with the classes of the reducers that its configuration names."""
        super().save_code(folder)
        reducers = getattr(self.base_model, "reducers", {})
        classes = {}
        for name in _names_of(self.config.reducers, self.config.trained_reducers):
            registered, used = REDUCERS.get(name), type(reducers[name]) if name in reducers else None
            # Sharding (FSDP) makes subclasses of classes on the spot.
            cls = registered if used is None or (registered and issubclass(used, registered)) else used
            if cls is not None and is_custom(cls):
                classes[name] = cls
        save_custom_reducers(classes, folder)


def is_custom(reducer_class: type[TokenReducer]) -> bool:
    """Whether a reducer does not come with AdaVTP."""
    return not _is_package(reducer_class.__module__)


def save_custom_reducers(classes: dict[str, type[TokenReducer]], folder: Path) -> None:
    """Writes the code of reducers that do not come with AdaVTP, by name, beside the model's in `folder`."""
    (folder / CODE_FOLDER / f"{CUSTOM}.py").write_text(custom_reducers_source(classes), encoding="utf-8")


def custom_reducers_source(classes: dict[str, type[TokenReducer]]) -> str:
    """
    The file that brings reducers which do not come with AdaVTP, for a flat folder with this package's modules.

    Args:
        classes: by the names that they are registered under.

    Raises:
        ValueError: if the code of a class cannot stand in a file.
    """
    if not classes:
        return f"{_HEADER}\n\nCUSTOM_REDUCERS = {{}}\n"
    # All but the two that import the file itself.
    siblings = {module: flat for flat, module in _modules().items() if flat != CUSTOM and module != __name__}
    source, entries = FlatSource(_is_package, siblings), []
    source.import_sibling(siblings[register_reducer.__module__], "register_reducer")
    published = {published.__qualname__ for published in PUBLISHED_REDUCERS}
    for name, reducer_class in sorted(classes.items()):
        try:
            if reducer_class.__qualname__ in published:
                raise ValueError("AdaVTP has a reducer of that class name; give the class and the reducer another")
            # A class that is registered by a call, or under a second name, has no decorator that says so.
            entries.append(f'    "{name}": register_reducer("{name}")({source.take_class(reducer_class)}),\n')
        except ValueError as error:
            raise ValueError(
                f"Reducer {name!r} ({reducer_class.__qualname__}) does not come with AdaVTP, and its code cannot go "
                f"into the folder: {error}. Weights and configuration are saved. Put the class, and what it uses, "
                "into a module file of its own, import it from there, and save again."
            ) from error
    return f"{_HEADER}\n\n{source.text()}\n\n\nCUSTOM_REDUCERS = {{\n{''.join(entries)}}}\n"


def load_custom_reducers(
    source: str | PathLike[str] | None, names: list[str], trust_remote_code: bool | None = None, **kwargs: Any
) -> None:
    """
    Registers the reducers that a folder, or a repository on the Hub, brings, if it is trusted and there are some.

    A class of the same qualified name that is registered already is replaced, as when a notebook's cell runs again.

    Args:
        names: reducers that the checkpoint uses.
        trust_remote_code: whether the folder's code may run.
        kwargs: those of `from_pretrained`.

    Raises:
        ValueError: if a name stays unknown, or a class of another name holds it.
    """
    custom = [name for name in names if name not in REDUCERS or is_custom(REDUCERS[name])]
    if source is None or not custom:
        return
    if trust_remote_code:
        for name, reducer_class in _brought_by(source, {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}).items():
            register_reducer(name)(reducer_class)
    if unknown := ", ".join(repr(name) for name in custom if name not in REDUCERS):
        raise ValueError(
            f"The configuration of {str(source)!r} names the reducer(s) {unknown}, which do not come with AdaVTP. "
            f"A folder that was saved with them brings their code in {CODE_FOLDER}/{CUSTOM}.py: pass "
            "`trust_remote_code=True` to run it, or import the module that registers them."
        )


def _names_in_use(
    config_class: type[PreTrainedConfig],
    source: str | PathLike[str] | None,
    config: PreTrainedConfig | str | PathLike[str] | None,
    kwargs: dict[str, Any],
) -> list[str]:
    """The reducers that a model will be built with."""
    if isinstance(config, PreTrainedConfig):
        return _names_of(getattr(config, "reducers", None), getattr(config, "trained_reducers", None))
    if config is None and source is None:
        return []
    hub_kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "model_type")}
    fields = config_class.get_config_dict(config or source, **hub_kwargs)[0]
    # What is asked for while loading goes before what is written down, which older folders have as one `reducer`.
    asked = [given[key] for given in (kwargs, fields) for key in ("reducers", "reducer") if given.get(key) is not None]
    return _names_of(asked[0] if asked else [], kwargs.get("trained_reducers", fields.get("trained_reducers")))


def _names_of(*entries: Any) -> list[str]:
    given = [entry for some in entries for entry in reducer_entries(some or [])]
    names = [entry if isinstance(entry, str) else entry["name"] for entry in given]
    return [name for name in dict.fromkeys(names) if name != "adaptive"]


@cache
def _modules() -> dict[str, str]:
    """The modules that a reducer's code may import, by their names in a saved folder, with those in this process."""
    return {flat: module_name(path) for flat, path in code_paths(Path(__file__)).items()}


def _is_package(module: str) -> bool:
    """Whether a module is part of AdaVTP, or of the folder whose copy of it this file is."""
    is_custom_file = module == _modules()[CUSTOM] or module.startswith(f"{_FLAT}.{CUSTOM}_")
    return (module == PACKAGE or module.startswith(f"{PACKAGE}.")) and not is_custom_file


def _brought_by(source: str | PathLike[str], hub_kwargs: dict[str, Any]) -> dict[str, type[TokenReducer]]:
    """The reducers of a folder or a repository, from the cache where transformers keeps code that it runs."""
    for file, name in CUSTOM_FILES.items():
        try:
            path = Path(HF_MODULES_CACHE, get_cached_module_file(source, file, **hub_kwargs))
        except OSError:
            continue
        return getattr(_module_of(path), name)
    return {}


def _module_of(file: Path) -> ModuleType:
    """The file as a module of this package, so that its classes are subclasses of the base classes here."""
    content = file.read_bytes()
    beside = sys.modules[_modules()[CUSTOM]]
    if Path(beside.__file__).read_bytes() == content:
        return beside
    name = f"{_FLAT}.{CUSTOM}_{hashlib.sha256(content).hexdigest()[:16]}"
    if name not in sys.modules:
        modules = _modules()
        for flat in get_relative_imports(file):
            module = importlib.import_module(modules[flat]) if flat in modules else _former_file(flat)
            sys.modules[f"{_FLAT}.{flat}"] = module
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _former_file(flat: str) -> ModuleType:
    """A file that folders had before names said where a file lies: what it had is now in one of the present files."""

    def find(name: str) -> Any:
        modules = [vars(importlib.import_module(module)) for module in _modules().values()]
        found = [module for module in modules if name in module]
        if not found:
            raise AttributeError(f"{flat}.py had {name!r}, which no file has any more.")
        at_home = [it for it in found if getattr(it[name], "__module__", None) == it["__name__"]]
        return (at_home or found)[0][name]

    former = ModuleType(f"{_FLAT}.{flat}")
    former.__getattr__ = find
    return former


__all__ = ["CUSTOM_REDUCERS", "CustomReducersMixin", "is_custom", "load_custom_reducers", "save_custom_reducers"]
