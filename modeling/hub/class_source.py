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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

_PLAIN = (type(None), type(...), bool, int, complex, str, bytes)
# What an assignment in a script may make anew wherever it runs.
_MADE_OF_CODE = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.GenericAlias, types.UnionType, TypeVar),
    *(re.Pattern, logging.Logger, torch.dtype),
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NOTEBOOK_CELL = re.compile(r"<ipython-input|<python-input|ipykernel")


@dataclass
class Statement:
    """A top-level statement: its node, the text that it stands in, and that text's file or cell."""

    node: ast.stmt
    text: str
    file: str

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
    A piece of the flat file.

    Attributes:
        origin: where it comes from, `"module.name"`.
        text: the code.
        place: what it is sorted by: where it stood.
        early: names that have to be there when it runs.
        late: names that have to be there when what it defines is called.
    """

    origin: str
    text: str
    place: tuple[int, int]
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
        blocks = ["\n".join(_import_lines({line for of_name in self.imports.values() for line in of_name}))]
        behind = "\n\n"
        # One statement may define several names.
        for definition in {definition.text: definition for definition in self._ordered()}.values():
            is_block = isinstance(ast.parse(definition.text).body[0], _DEFINITIONS)
            before = "\n\n\n" if is_block or behind == "\n\n\n" else behind
            blocks += [before, definition.text]
            behind = "\n\n\n" if is_block else "\n"
        return "".join(blocks).strip("\n")

    def _ordered(self) -> list[Definition]:
        ordered: list[Definition] = []
        begun: set[int] = set()

        def add(definition: Definition, is_called: bool) -> None:
            if id(definition) in begun:
                return
            begun.add(id(definition))
            # What runs now may call what it names, and that needs what it uses itself.
            for name in sorted(definition.early | (definition.late if is_called else set())):
                if name in self.definitions:  # Anything else is an import or built in.
                    add(self.definitions[name], is_called=True)
            ordered.append(definition)

        for definition in sorted(self.definitions.values(), key=lambda definition: definition.place):
            add(definition, is_called=False)
        return ordered

    def _take(self, module: types.ModuleType, name: str, bound: str | None = None, of: Any = None) -> None:
        """Takes what `name` means in `module`, under the name `bound`; `of` is its value, where that has changed."""
        bound, origin = bound or name, f"{module.__name__}.{name}"
        if bound in self.definitions and self.definitions[bound].origin == origin:
            return
        value = vars(module).get(name) if of is None else of
        statements = self._binders(module, name, value)
        if isinstance(value, types.ModuleType) and self._home(value.__name__) != "library":
            raise ValueError(f"it uses the module {name!r} itself; import what it needs of it by name")
        if statements and isinstance(statements[-1].node, ast.Import | ast.ImportFrom):
            for statement in statements:
                self._take_import(module, statement.node, name, bound)
            return
        if bound != name:
            self._take(module, name)
            place = self.definitions[name].place if name in self.definitions else (0, 0)
            self._define(bound, Definition(origin, f"{bound} = {name}", (place[0], place[1] + 1), {name}))
            return
        if not _is_script(module):
            statements = [statement for statement in statements if not _is_main_block(statement.node)]
        if not statements:
            raise ValueError(f"no statement in {module.__name__!r} that can be found defines {name!r}")
        last = statements[-1]
        if _is_script(module) and not _is_repeatable(last.node, value):
            self._define(name, Definition(origin, _text_of_value(name, value, last), self._place(module, last)))
        elif isinstance(last.node, _DEFINITIONS) or _is_script(module):
            self._take_statements(module, name, [last])
        else:
            self._take_statements(module, name, statements)

    def _take_statements(self, module: types.ModuleType, name: str, statements: list[Statement]) -> None:
        """Takes what defines `name`, and first of all writes down that it does: what it uses may lead back to it."""
        place, text = self._place(module, statements[-1]), "\n".join(statement.source for statement in statements)
        definition = self._define(name, Definition(f"{module.__name__}.{name}", "", place))
        definition.text, introduced = self._rewritten(module, text)
        definition.early, definition.late, _ = _names(definition.text)
        if any(_has_future_annotations(statement.text) for statement in statements):
            self._import("annotations", "from __future__ import annotations")
        for used in sorted((definition.early | definition.late) - introduced - {name}):
            if used in vars(module) and not (used.startswith("__") and used.endswith("__")):
                self._take(module, used)

    def _place(self, module: types.ModuleType, statement: Statement) -> tuple[int, int]:
        return list(self._statements).index(module.__name__), self._statements[module.__name__].index(statement)

    def _define(self, name: str, definition: Definition) -> Definition:
        other = self.definitions.get(name)
        if name in self.imports or (other is not None and other.origin != definition.origin):
            place = other.origin if other is not None else "; ".join(sorted(self.imports[name]))
            raise ValueError(f"{name!r} means both {definition.origin} and {place}; rename one of them")
        self.definitions[name] = definition
        return definition

    def _import(self, bound: str, line: str) -> None:
        lines = self.imports.setdefault(bound, set())
        if bound in self.definitions or (lines and line not in lines and not _is_plain_import(line, *lines)):
            raise ValueError(f"{bound!r} has two meanings, one of them `{line}`; rename one of them")
        lines.add(line)

    def _take_import(self, module: types.ModuleType, node: ast.Import | ast.ImportFrom, name: str, bound: str) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                if (alias.asname or alias.name.partition(".")[0]) == name:
                    if bound != name and alias.asname is None:
                        self._import(bound, f"import {name} as {bound}")
                    else:
                        self._import(bound, f"import {alias.name}{f' as {bound}' if alias.asname else ''}")
            elif alias.name == "*" or (alias.asname or alias.name) == name:
                self._take_from(_target(node, module), name if alias.name == "*" else alias.name, bound)

    def _take_from(self, target: str, name: str, bound: str) -> None:
        """Makes what `from target import name` means available as `bound`."""
        home = self._home(target)
        if home == "library":
            self._import(bound, f"from {target} import {name}" + (f" as {bound}" if bound != name else ""))
        elif home == "own":
            self._take(importlib.import_module(target), name, bound)
        else:
            self._import(bound, self._sibling_line(target, name, bound))

    def _sibling_line(self, target: str, name: str, bound: str) -> str:
        """How the file imports from the package what `from target import name` means."""
        holder = importlib.import_module(target)
        module = getattr(getattr(holder, name), "__module__", None) or holder.__name__
        file = self.siblings.get(module if self.is_package(module) else holder.__name__)
        if file is None:
            raise ValueError(f"it uses {target}.{name}, which is not among the files that travel with a checkpoint")
        return f"from .{file} import {name}" + (f" as {bound}" if bound != name else "")

    def _rewritten(self, module: types.ModuleType, source: str) -> tuple[str, set[str]]:
        """A statement with what it says of modules that do not travel rewritten, and the names that this brings in."""
        tree, edits, introduced = ast.parse(source), [], set()
        inner = _names(source)[2]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and any(self._home(alias.name) != "library" for alias in node.names):
                raise ValueError(f"it has `{ast.unparse(node)}` inside; import by name instead")
            if isinstance(node, ast.ImportFrom) and (home := self._home(_target(node, module))) != "library":
                if home == "own":
                    raise ValueError(f"it has `{ast.unparse(node)}` inside; import at the top of the file instead")
                lines = [
                    self._sibling_line(_target(node, module), alias.name, alias.asname or alias.name)
                    for alias in node.names
                ]
                edits.append((node, f"\n{' ' * node.col_offset}".join(lines)))
            if isinstance(node, ast.Attribute) and (found := self._attribute_of_module(module, node)):
                target, name = found
                if name in inner or vars(module).get(name, getattr(target, name)) is not getattr(target, name):
                    raise ValueError(f"it has a name {name!r} of its own beside {ast.unparse(node)}; rename it")
                self._take_from(target.__name__, name, name)
                introduced.add(name)
                edits.append((node, name))
        return _edited(source, edits), introduced

    def _attribute_of_module(
        self, module: types.ModuleType, node: ast.Attribute
    ) -> tuple[types.ModuleType, str] | None:
        """The module and the name that `module.name` means, where the module does not travel as one."""
        names, base = [], node.value
        while isinstance(base, ast.Attribute):
            names.append(base.attr)
            base = base.value
        value = vars(module).get(base.id) if isinstance(base, ast.Name) else None
        for name in reversed(names):
            value = getattr(value, name, None) if isinstance(value, types.ModuleType) else None
        if not isinstance(value, types.ModuleType) or self._home(value.__name__) == "library":
            return None
        is_module = isinstance(getattr(value, node.attr, None), types.ModuleType)
        return None if is_module else (value, node.attr)

    def _home(self, name: str) -> str:
        """Whether a module is part of the `"package"`, of a `"library"`, or the user's `"own"`."""
        if self.is_package(name):
            return "package"
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names:
            return "library"
        spec = None if top == "__main__" else getattr(sys.modules.get(top), "__spec__", None)
        folders = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
        if top in sys.modules and not any(
            {"site-packages", "dist-packages"} & set(Path(folder).parts) for folder in folders
        ):
            return "own"
        return "library"

    def _binders(self, module: types.ModuleType, name: str, value: Any = None) -> list[Statement]:
        """Top-level statements that give `name` its meaning, the one that counts last."""
        if module.__name__ not in self._statements:
            self._statements[module.__name__] = list(_statements(module))
        found = [
            statement
            for statement in self._statements[module.__name__]
            if name in _bound_names(statement.node) or _imports_by_star(statement.node, name, module)
        ]
        # Of a class that two cells of a notebook define, the cell that this one comes from.
        here = [statement for statement in found if statement.file in _code_files(value)]
        return [statement for statement in found if statement not in here] + here


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
    for key in files:
        text = "".join(linecache.getlines(key, vars(module)))
        try:
            yield from (Statement(node, text, key) for node in ast.parse(text).body)
        except SyntaxError:
            continue


def _code_files(value: Any) -> set[str]:
    """The file or cell that a function, or the functions of a class, were compiled from."""
    functions = vars(value).values() if isinstance(value, type) else [value]
    functions = [inspect.unwrap(item) for item in functions if isinstance(item, types.FunctionType)]
    return {function.__code__.co_filename for function in functions if isinstance(function, types.FunctionType)}


def _bound_names(node: ast.AST) -> set[str]:
    """Names that a statement gives a meaning in the scope that it stands in."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    scopes = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return {
        name for child in ast.iter_child_nodes(node) if not isinstance(child, scopes) for name in _bound_names(child)
    }


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _imports_by_star(node: ast.stmt, name: str, module: types.ModuleType) -> bool:
    if not isinstance(node, ast.ImportFrom) or node.names[0].name != "*":
        return False
    imported = importlib.import_module(_target(node, module))
    return name in getattr(imported, "__all__", [key for key in vars(imported) if not key.startswith("_")])


def _target(node: ast.ImportFrom, module: types.ModuleType) -> str:
    """The full name of the module that a `from` imports from."""
    if not node.level:
        return node.module
    return importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)


def _is_repeatable(node: ast.stmt, value: Any) -> bool:
    """Whether a statement of a script may be taken as it stands, without running what else the script does."""
    if isinstance(node, _DEFINITIONS):
        return True
    if isinstance(node, ast.Try | ast.If):
        # What is imported only where it is installed, and what stands for it elsewhere.
        inner = [part for part in ast.walk(node) if isinstance(part, ast.stmt) and part is not node]
        allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Pass)
        imports = any(isinstance(part, ast.Import | ast.ImportFrom) for part in inner)
        return imports and not _is_main_block(node) and all(isinstance(part, allowed) for part in inner)
    return isinstance(node, ast.Assign) and isinstance(value, _MADE_OF_CODE)


def _literal(value: Any) -> str:
    """A plain value as code. Raises `ValueError` for any other."""
    if isinstance(value, float) and type(value) is float:
        return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
    if type(value) in _PLAIN:
        return "..." if value is ... else repr(value)
    if type(value) is dict:
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if type(value) is tuple:
        return "(" + "".join(f"{_literal(item)}, " for item in value).strip() + ")"
    if type(value) is list:
        return "[" + ", ".join(map(_literal, value)) + "]"
    if type(value) in (set, frozenset):
        # Sorted, because the order of strings in a set differs from process to process.
        return f"{type(value).__name__}([{', '.join(sorted(map(_literal, value)))}])"
    raise ValueError(f"a {type(value).__name__} is no plain value")


def _text_of_value(name: str, value: Any, statement: Statement) -> str:
    """A value of a script as it is now: what it was made from may be gone, or be a whole run."""
    try:
        text = f"{name} = {_literal(value)}"
    except ValueError:
        raise ValueError(
            f"it uses {name!r}, which is a {type(value).__name__} that {statement.file} makes when it runs"
        ) from None
    node = statement.node
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
        return text
    try:
        return statement.source if _literal(ast.literal_eval(node.value)) == _literal(value) else text
    except ValueError:
        return text


def _names(source: str) -> tuple[set[str], set[str], set[str]]:
    """Of a statement: global names that it needs to run, those that its functions need, and its functions' own."""
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


def _edited(source: str, edits: list[tuple[ast.expr | ast.stmt, str]]) -> str:
    """Source with the text of some nodes replaced. Columns of nodes count bytes."""
    lines = [line.encode() for line in source.splitlines()]
    for node, text in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        first, last = node.lineno - 1, node.end_lineno - 1
        lines[first : last + 1] = [
            lines[first][: node.col_offset] + text.encode() + lines[last][node.end_col_offset :]
        ]
    return "\n".join(line.decode() for line in lines)


def _has_future_annotations(text: str) -> bool:
    return any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in ast.parse(text).body)


def _import_lines(lines: set[str]) -> list[str]:
    """Imports as a file begins with: libraries, then siblings, one line for each module."""
    merged: dict[str, list[str]] = {}
    for line in sorted(lines):
        module, _, name = line.partition(" import ")
        merged.setdefault(module, []).append(name)
    lines = [f"{module} import {', '.join(names)}" if names[0] else module for module, names in merged.items()]
    return sorted(lines, key=lambda line: ("__future__" not in line, line.startswith("from ."), line))


def _is_plain_import(*lines: str) -> bool:
    """Whether all lines are `import a.b` of one package, which add to each other."""
    return all(line.startswith("import ") and " as " not in line for line in lines)
