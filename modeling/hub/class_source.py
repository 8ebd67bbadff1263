"""The source of classes, with everything of their modules that they use, as one flat file.

A class of a user stands in a script, a notebook or a module of a project. Copying the whole script would run it, so
what is taken is the class and, of its module, the imports, functions, classes and values that it uses, those that they
use, and so on. What comes from installed libraries stays an import.
"""

import ast
import importlib
import importlib.util
import inspect
import linecache
import logging
import math
import re
import symtable
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

# What an assignment in a script may make anew wherever it runs.
_MADE_OF_CODE = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.GenericAlias, types.UnionType, TypeVar),
    *(re.Pattern, logging.Logger, torch.dtype),
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)
_NOTEBOOK_CELL = re.compile(r"<ipython-input|<python-input|ipykernel")


@dataclass
class Statement:
    """A top-level statement: its node, the text that it stands in, that text's file or cell, and its place there."""

    node: ast.stmt
    text: str
    file: str
    place: int

    @property
    def source(self) -> str:
        """Its own text, decorators included."""
        if not isinstance(self.node, _DEFINITIONS):
            return ast.get_source_segment(self.text, self.node)
        first = min([self.node.lineno, *(decorator.lineno for decorator in self.node.decorator_list)])
        return "\n".join(self.text.split("\n")[first - 1 : self.node.end_lineno])


@dataclass
class Definition:
    """
    A piece of the flat file: `"module.name"` that it comes from, where it stood, and the code; names that have to be
    there when it runs (`early`), and when what it defines is called (`late`).
    """

    origin: str
    place: tuple[int, float]
    text: str = ""
    early: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)


class FlatSource:
    """
    Collects definitions for a file that stands in one folder with the modules of a package.

    Args:
        is_package: says of a module's name whether it is part of that package.
        siblings: modules of the package that the file may import, with the names that they have beside it.
    """

    def __init__(self, is_package: Callable[[str], bool], siblings: dict[str, str]) -> None:
        self.is_package, self.siblings = is_package, siblings
        self.imports: dict[str, set[str]] = {}
        self.definitions: dict[str, Definition] = {}
        self._statements: dict[str, list[Statement]] = {}

    def take_class(self, cls: type) -> str:
        """
        Takes a class and what it uses.

        Returns:
            The expression that names it in the file.

        Raises:
            ValueError: if there is something that a file cannot hold; the message says what.
        """
        outermost = cls.__qualname__.partition(".")[0]
        module = sys.modules.get(cls.__module__)
        if "<locals>" in cls.__qualname__:
            raise ValueError(f"{cls.__qualname__} is defined inside a function")
        if module is None or not any(
            isinstance(statement.node, ast.ClassDef) for statement in self._binders(module, outermost)
        ):
            raise ValueError(f"the source of {cls.__qualname__} in {cls.__module__!r} is not available")
        self._take(module, outermost, of=cls)
        return cls.__qualname__

    def import_sibling(self, module: str, name: str) -> None:
        """Imports `name` from a module of the package."""
        self._import(name, f"from .{module} import {name}")

    def text(self) -> str:
        """The imports and the definitions; each stands behind what it needs to run."""
        lines = {line for of_name in self.imports.values() for line in of_name}
        lines = sorted(lines, key=lambda line: ("__future__" not in line, line.startswith("from ."), line))
        # One statement may define several names.
        return "\n\n\n".join(["\n".join(lines), *dict.fromkeys(self._ordered())])

    def _ordered(self) -> list[str]:
        ordered, begun = [], set()

        def add(name: str, is_called: bool) -> None:
            if name in begun or name not in self.definitions:  # Anything else is an import or built in.
                return
            begun.add(name)
            definition = self.definitions[name]
            # What runs now may call what it names, and that needs what it uses itself.
            for used in sorted(definition.early | (definition.late if is_called else set())):
                add(used, is_called=True)
            ordered.append(definition.text)

        for name in sorted(self.definitions, key=lambda name: self.definitions[name].place):
            add(name, is_called=False)
        return ordered

    def _take(self, module: types.ModuleType, name: str, bound: str | None = None, of: Any = None) -> None:
        """Takes what `name` means in `module`, under the name `bound`; `of` is its value, where that has changed."""
        bound, value = bound or name, vars(module).get(name) if of is None else of
        if bound in self.definitions and self.definitions[bound].origin == f"{module.__name__}.{name}":
            return
        if isinstance(value, types.ModuleType) and self._home(value.__name__) != "library":
            raise ValueError(f"it uses the module {name!r} itself; import what it needs of it by name")
        statements = self._binders(module, name, value)
        if statements and isinstance(statements[-1].node, _IMPORTS):
            for statement in statements:
                self._take_import(module, statement.node, name, bound)
        elif bound != name:
            self._take(module, name)
            alias = self._define(bound, name, module, math.inf)
            alias.text, alias.early = f"{bound} = {name}", {name}
        elif not statements:
            raise ValueError(f"no statement in {module.__name__!r} that can be found defines {name!r}, or imports it")
        else:
            self._take_statements(module, name, statements, value)

    def _take_statements(self, module: types.ModuleType, name: str, statements: list[Statement], value: Any) -> None:
        """Takes what defines `name`, and first of all writes down that it does: what it uses may lead back to it."""
        last = statements[-1]
        definition = self._define(name, name, module, last.place)
        # A script's values are taken as they are, without running what else the script does.
        if _is_script(module) and not _is_repeatable(last.node, value):
            definition.text = _text_of_value(name, value, last.file)
            return
        if _is_script(module) or isinstance(last.node, _DEFINITIONS):
            statements = [last]
        source = "\n".join(statement.source for statement in statements)
        definition.text, introduced = self._rewritten(module, source)
        if any(_has_future_annotations(statement.text) for statement in statements):
            self._import("annotations", "from __future__ import annotations")
        definition.early, definition.late, _ = _names(definition.text)
        for used in sorted((definition.early | definition.late) - introduced - {name}):
            if used in vars(module) and not (used.startswith("__") and used.endswith("__")):
                self._take(module, used)

    def _define(self, bound: str, name: str, module: types.ModuleType, place: float) -> Definition:
        other = self.definitions.get(bound)
        if bound in self.imports or other is not None:
            there = other.origin if other is not None else "; ".join(sorted(self.imports[bound]))
            raise ValueError(f"{bound!r} means both {module.__name__}.{name} and {there}; rename one of them")
        of_module = list(self._statements).index(module.__name__)
        self.definitions[bound] = Definition(f"{module.__name__}.{name}", (of_module, place))
        return self.definitions[bound]

    def _import(self, bound: str, line: str) -> None:
        lines = self.imports.setdefault(bound, set()) | {line}
        # `import a.b` and `import a.c` add to each other.
        are_plain = all(each.startswith("import ") and " as " not in each for each in lines)
        if bound in self.definitions or (len(lines) > 1 and not are_plain):
            raise ValueError(f"{bound!r} has two meanings, one of them `{line}`; rename one of them")
        self.imports[bound] = lines

    def _take_import(self, module: types.ModuleType, node: ast.Import | ast.ImportFrom, name: str, bound: str) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                if (alias.asname or alias.name.partition(".")[0]) == name:
                    imported = alias.name if alias.asname or bound == name else name
                    renamed = f" as {bound}" if alias.asname or bound != name else ""
                    self._import(bound, f"import {imported}{renamed}")
            elif (alias.asname or alias.name) == name:
                self._take_from(_target(node, module), alias.name, bound)

    def _take_from(self, target: str, name: str, bound: str) -> None:
        """Makes what `from target import name` means available as `bound`."""
        if self._home(target) == "own":
            self._take(self._module(target), name, bound)
        else:
            self._import(bound, self._import_line(target, name, bound))

    def _import_line(self, target: str, name: str, bound: str) -> str:
        """How the file imports what `from target import name` means, of a library or of the package."""
        if self._home(target) == "package":
            holder = importlib.import_module(target)
            module = getattr(getattr(holder, name), "__module__", None) or holder.__name__
            file = self.siblings.get(module if self.is_package(module) else holder.__name__)
            if file is None:
                raise ValueError(
                    f"it uses {target}.{name}, which is not among the files that travel with a checkpoint"
                )
            target = f".{file}"
        return f"from {target} import {name}" + (f" as {bound}" if bound != name else "")

    def _rewritten(self, module: types.ModuleType, source: str) -> tuple[str, set[str]]:
        """Code without mention of modules that do not travel as such, and the names that it uses in their place."""
        (_, _, inner), introduced, before = _names(source), set(), source
        for node in ast.walk(ast.parse(before)):
            if isinstance(node, _IMPORTS):
                targets = [_target(node, module)] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
                homes = {self._home(target) for target in targets}
                if "own" in homes or (isinstance(node, ast.Import) and "package" in homes):
                    raise ValueError(f"it has `{ast.unparse(node)}` inside; import by name at the top of the file")
                if "package" in homes:
                    lines = [self._import_line(targets[0], x.name, x.asname or x.name) for x in node.names]
                    new = f"\n{' ' * node.col_offset}".join(lines)
                    source = source.replace(ast.get_source_segment(before, node), new)
            if isinstance(node, ast.Attribute) and (target := self._module_of_attribute(module, node)):
                name, value = node.attr, getattr(target, node.attr)
                if name in inner or vars(module).get(name, value) is not value:
                    raise ValueError(f"it has a name {name!r} of its own beside {ast.unparse(node)}; rename it")
                self._take_from(target.__name__, name, name)
                introduced.add(name)
                source = re.sub(rf"(?<![\w.]){re.escape(ast.unparse(node))}\b", name, source)
        return source, introduced

    def _module_of_attribute(self, module: types.ModuleType, node: ast.Attribute) -> types.ModuleType | None:
        """The module that stands before the dot, where it does not travel as one, and a name of it behind."""
        names, base = [], node.value
        while isinstance(base, ast.Attribute):
            names.append(base.attr)
            base = base.value
        value = vars(module).get(base.id) if isinstance(base, ast.Name) else None
        for name in reversed(names):
            value = getattr(value, name, None) if isinstance(value, types.ModuleType) else None
        if not isinstance(value, types.ModuleType) or self._home(value.__name__) == "library":
            return None
        return None if isinstance(getattr(value, node.attr, None), types.ModuleType) else value

    def _home(self, name: str) -> str:
        """Whether a module is part of the `"package"`, of a `"library"`, or the user's `"own"`."""
        if self.is_package(name):
            return "package"
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top not in sys.modules:
            return "library"
        spec = None if top == "__main__" else getattr(sys.modules[top], "__spec__", None)
        folders = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
        installed = {"site-packages", "dist-packages"}
        return "library" if any(installed & set(Path(folder).parts) for folder in folders) else "own"

    def _module(self, name: str) -> types.ModuleType:
        """A module of the user's, whose statements are known from then on."""
        module = importlib.import_module(name)
        if name not in self._statements:
            self._statements[name] = list(_statements(module))
        return module

    def _binders(self, module: types.ModuleType, name: str, value: Any = None) -> list[Statement]:
        """Top-level statements that give `name` its meaning, the one that counts last."""
        self._module(module.__name__)
        found = [each for each in self._statements[module.__name__] if name in _bound_names(each.node)]
        # Of a class that two cells of a notebook define, the cell that this one comes from.
        files = _code_files(value)
        return sorted(found, key=lambda statement: statement.file in files)


def _is_script(module: types.ModuleType) -> bool:
    return module.__name__ in ("__main__", "__mp_main__")


def _statements(module: types.ModuleType) -> Iterator[Statement]:
    """The top-level statements of a module's file, or of a notebook's cells in the order of their first run."""
    file = getattr(module, "__file__", None)
    if file is not None:
        files = [file]
    else:
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        cells = {cell for value in own for cell in _code_files(value)}
        files = [key for key in list(linecache.cache) if key in cells or _NOTEBOOK_CELL.search(key)]
    place = 0
    for key in files:
        text = "".join(linecache.getlines(key, vars(module)))
        try:
            nodes = ast.parse(text).body
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                imported = importlib.import_module(_target(node, module))
                names = getattr(imported, "__all__", [name for name in vars(imported) if not name.startswith("_")])
                node.names = [ast.alias(name, None) for name in names]
            if _is_script(module) or not _is_main_block(node):
                yield Statement(node, text, key, place)
            place += 1


def _code_files(value: Any) -> set[str]:
    """The file or cell that a function, or the functions of a class, were compiled from."""
    functions = vars(value).values() if isinstance(value, type) else [value]
    functions = [inspect.unwrap(item) for item in functions if isinstance(item, types.FunctionType)]
    return {function.__code__.co_filename for function in functions if isinstance(function, types.FunctionType)}


def _bound_names(node: ast.AST) -> set[str]:
    """Names that a statement gives a meaning in the scope that it stands in."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    if isinstance(node, _IMPORTS):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    scopes = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return {
        name for child in ast.iter_child_nodes(node) if not isinstance(child, scopes) for name in _bound_names(child)
    }


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _target(node: ast.ImportFrom, module: types.ModuleType) -> str:
    """The full name of the module that a `from` imports from."""
    if not node.level:
        return node.module
    return importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)


def _is_repeatable(node: ast.stmt, value: Any) -> bool:
    """Whether a statement of a script may be taken as it stands."""
    if isinstance(node, ast.Try | ast.If):
        # What is imported only where it is installed, and what stands for it elsewhere.
        inner = [part for part in ast.walk(node) if isinstance(part, ast.stmt) and part is not node]
        has_others = any(not isinstance(part, (*_IMPORTS, ast.Assign, ast.Pass)) for part in inner)
        return any(isinstance(part, _IMPORTS) for part in inner) and not has_others and not _is_main_block(node)
    return isinstance(node, _DEFINITIONS) or (isinstance(node, ast.Assign) and isinstance(value, _MADE_OF_CODE))


def _text_of_value(name: str, value: Any, file: str) -> str:
    """A plain value as code: what it was made from may be gone, or be a whole run."""
    if type(value) is float and not math.isfinite(value):
        return f"{name} = float({str(value)!r})"
    with suppress(ValueError, SyntaxError):
        if ast.literal_eval(repr(value)) == value:
            return f"{name} = {value!r}"
    raise ValueError(f"it uses {name!r}, which is a {type(value).__name__} that {file} makes when it runs")


def _names(source: str) -> tuple[set[str], set[str], set[str]]:
    """Of code: global names that it needs to run, those that its functions need, and its functions' own."""
    early, late, inner = set(), set(), set()

    def look(table: symtable.SymbolTable, in_function: bool) -> None:
        in_function = in_function or table.get_type() == "function"
        for symbol in table.get_symbols():
            is_module = table.get_type() == "module"
            if (is_module and symbol.is_referenced()) or (not is_module and symbol.is_global()):
                (late if in_function else early).add(symbol.get_name())
            elif in_function and symbol.is_local():
                inner.add(symbol.get_name())
        for child in table.get_children():
            look(child, in_function)

    look(symtable.symtable(source, "<source>", "exec"), False)
    return early, late - early, inner


def _has_future_annotations(text: str) -> bool:
    return any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in ast.parse(text).body)
