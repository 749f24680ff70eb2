"""Code as a key sees it: what it does and what it mentions, without comments, formatting, line numbers and docstrings.

Code is taken as it was compiled: Python's own compiler drops what a program does not mean. Modules of the user's that code
imports while it runs are compiled from their files, and never run here.
"""

import dis
import importlib
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from bt_ray.layout import SWEEP
from bt_ray.task.fingerprint.graph import text_hash

CONSTANTS = frozenset(dis.hasconst)
EXTENDED, IMPORT, STORE_NAME = (dis.opmap[name] for name in ("EXTENDED_ARG", "IMPORT_NAME", "STORE_NAME"))
CACHE, LOAD_ATTR, LOAD_METHOD = (dis.opmap.get(name, -1) for name in ("CACHE", "LOAD_ATTR", "LOAD_METHOD"))
ATTRIBUTE_BITS = 1 if sys.version_info >= (3, 12) else 0
"""Below the number of a name of an attribute that is loaded."""
LOAD_GLOBAL = dis.opmap["LOAD_GLOBAL"]
LOAD_NAMES = {dis.opmap[name] for name in ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS") if name in dis.opmap}
NOT_SEEN_THROUGH = {
    "__import__",
    "eval",
    "exec",
    "globals",
    "import_module",
    "run_module",
    "run_path",
    "spec_from_file_location",
}
"""Names by which code runs other code that it does not mention."""
LONGEST_NAME = 200
"""Of a file or a variable of the environment, in a text."""
NO_SOURCES = {"__pycache__", "node_modules", "site-packages"}
MOST_FILES = 5000


@dataclass(frozen=True)
class Import:
    """`from {level dots}name import {names}` inside of code."""

    name: str
    level: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """What a code object does, with all code inside it.

    Attributes:
        digest: A hash of that.
        names: All names in it, of variables of its module and of attributes.
        variables: Those of its module, or of Python.
        imports: What it imports.
        chains: Variables with the attributes that are taken of them, as `("a", "b")` in `f(a.b)`.
        texts: Constants that may be the name of a file or of a variable of the environment.
    """

    digest: str
    names: frozenset[str]
    variables: frozenset[str]
    imports: tuple[Import, ...]
    chains: frozenset[tuple[str, ...]]
    texts: frozenset[str]

    @property
    def is_seen_through(self) -> bool:
        return not self.variables & NOT_SEEN_THROUGH and "import_module" not in self.names and "modules" not in self.names


_read: dict[int, tuple[CodeType, Code]] = {}
"""What was read, by the code object's id, with the object, so that no other gets its id."""


def read_code(code: CodeType) -> Code:
    """What a code object does. Each is read once."""
    known = _read.get(id(code))
    if known is None:
        known = _read[id(code)] = (code, _read_code(code))
    return known[1]


def _read_code(code: CodeType) -> Code:
    numbers: dict[int, int] = {}
    imports: list[Import] = []
    variables: set[str] = set()
    chains: set[tuple[str, ...]] = set()
    chain: tuple[str, ...] = ()
    told: list[str] = []
    loaded: list[Any] = [None, None]
    argument = 0
    operations = code.co_code
    for at in range(0, len(operations), 2):
        operation, argument = operations[at], argument << 8 | operations[at + 1]
        if operation == EXTENDED:
            continue
        shown = argument
        if operation in (LOAD_ATTR, LOAD_METHOD):
            chain = (*chain, code.co_names[argument >> (ATTRIBUTE_BITS if operation == LOAD_ATTR else 0)]) if chain else ()
        elif operation != CACHE:
            chains.add(chain)
            chain = ()
        if operation in CONSTANTS:
            loaded = [loaded[-1], code.co_consts[argument]]
            # Numbered as they are used: a docstring, which is not, leaves no trace.
            shown = -1 if _stores_line_number(code, at + 2) else numbers.setdefault(argument, len(numbers))
        elif operation == IMPORT:
            level, names = loaded
            imports.append(Import(code.co_names[argument], level or 0, tuple(names or ())))
        elif operation == LOAD_GLOBAL:
            chain = (code.co_names[argument >> 1],)
            variables.add(chain[0])
        elif operation in LOAD_NAMES:
            chain = (code.co_names[argument],)
            variables.add(chain[0])
        told.append(f"{operation},{shown}")
        argument = 0
    constants = [code.co_consts[number] for number in numbers]
    inner = [read_code(item) for item in constants if isinstance(item, CodeType)]
    texts = [item for item in _texts(constants) if item and len(item) <= LONGEST_NAME and "\n" not in item]
    digest = text_hash(
        ";".join(told),
        *map(_constant, constants),
        repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_exceptiontable)),
        repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)),
    )
    stored = () if code.co_flags & CO_OPTIMIZED else ("__doc__",)  # by a module or a class that has a docstring
    return Code(
        digest,
        frozenset(code.co_names).difference(stored).union(*(item.names for item in inner)),
        frozenset(variables).union(*(item.variables for item in inner)),
        (*imports, *(found for item in inner for found in item.imports)),
        frozenset(chains - {()}).union(*(item.chains for item in inner)),
        frozenset(texts).union(*(item.texts for item in inner)),
    )


def _texts(constants: Iterable[Any]) -> Iterator[str]:
    for item in constants:
        if isinstance(item, str):
            yield item
        elif isinstance(item, tuple | frozenset):
            yield from _texts(item)


def _stores_line_number(code: CodeType, at: int) -> bool:
    operations = code.co_code
    stored = at < len(operations) and operations[at] == STORE_NAME
    return stored and code.co_names[operations[at + 1]] == "__firstlineno__"


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return f"code {value.co_name} {read_code(value).digest}"
    if isinstance(value, tuple):
        return f"tuple {[_constant(item) for item in value]}"
    if isinstance(value, frozenset):
        return f"set {sorted(_constant(item) for item in value)}"
    if isinstance(value, int):
        return f"{type(value).__name__} {value:x}"
    return f"{type(value).__name__} {value!r}"


def read_source(path: str) -> Code | None:
    """What a file of code does; None if it is not Python's, or cannot be compiled."""
    try:
        return read_code(compile(Path(path).read_bytes(), "<source>", "exec", dont_inherit=True))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@cache
def names_in(file: str) -> frozenset[str]:
    """All names in a file of code."""
    read = read_source(file)
    return frozenset() if read is None else read.names


@cache
def is_installed(file: str) -> bool:
    """Whether a file of code belongs to Python or to an installed package, rather than to the user.

    Code without a file, as a notebook's and what `exec` made, is the user's.
    """
    if not file or file.startswith("<frozen"):
        return True
    if file.startswith("<"):
        return False
    path = Path(file).resolve()
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(
        path.is_relative_to(root) for root in _library_roots()
    )


@cache
def _library_roots() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[2])}
    return tuple(Path(root).resolve() for root in roots)


def own_attribute(module: Any, name: str) -> Any:
    """What a module itself holds under a name, else None. A lazy module would import others when it is asked for more."""
    return vars(module).get(name) if isinstance(module, ModuleType) else None


def is_users_module(module: ModuleType) -> bool:
    """Whether a module is the user's; a folder of modules without a file of its own may be."""
    file = own_attribute(module, "__file__")
    if isinstance(file, str):
        return not is_installed(file)
    if module.__name__ == "__main__":
        return True
    folders = list(own_attribute(module, "__path__") or ())
    return bool(folders) and not is_installed(str(folders[0]))


def is_users_function(member: Any) -> bool:
    """Whether something is a function that a user wrote, and no code that Python made."""
    if not isinstance(member, FunctionType):
        return False
    file = member.__code__.co_filename
    return not file.startswith("<") and not is_installed(file)


def distribution_version(name: str) -> str:
    """The version of an installed distribution; `""` if it is not installed here."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""


@cache
def package_version(top: str) -> str:
    """The version of an installed package, by the name that is imported; Python's own for its modules."""
    if top in sys.stdlib_module_names:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    if found := distribution_version(top):
        return found
    spec = _find(top, tuple(sys.path))
    places = [spec[0], *spec[1]] if spec is not None else []
    for place in places:
        folder = Path(place).parent if Path(place).stem != "__init__" else Path(place).parents[1]
        for record in sorted(folder.glob("*.dist-info/RECORD")):
            files = record.read_bytes()
            if any(
                files.startswith(start) or b"\n" + start in files for start in (f"{top}/".encode(), f"{top}.py".encode())
            ):
                return record.parent.name.removesuffix(".dist-info").partition("-")[2]
    shown = own_attribute(sys.modules.get(top), "__version__")
    return shown if isinstance(shown, str) else ""


@dataclass(frozen=True)
class Found:
    """What imports find: files of the user's, and the top names of installed packages."""

    files: tuple[str, ...]
    packages: tuple[str, ...]


def find_imports(imports: tuple[Import, ...], folder: str) -> Found:
    """What imports would load, without loading it.

    Args:
        imports: The imports.
        folder: Where the file lies that has them; `""` for code without a file.
    """
    files: dict[str, None] = {}
    packages: dict[str, None] = {}
    for found in imports:
        if found.level:
            base = folder
            for _ in range(found.level - 1):
                base = os.path.dirname(base)
            dotted = found.name.split(".") if found.name else []
            files |= dict.fromkeys(_files_of(dotted, found.names, [base]))
            continue
        top, *rest = found.name.split(".")
        places = [folder, *sys.path] if folder else list(sys.path)
        spec = None if top in sys.stdlib_module_names else _find(top, tuple(places))
        if spec is None or (spec[0] and is_installed(spec[0])) or (not spec[0] and all(map(is_installed, spec[1]))):
            packages[top] = None
        else:
            files |= dict.fromkeys(_files_of([top, *rest], found.names, places))
    return Found(tuple(files), tuple(packages))


@cache
def _find(name: str, places: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """The file of a module below `places`, and the folders of a package."""
    try:
        spec = PathFinder.find_spec(name, list(places))
    except (ImportError, ValueError, OSError):
        return None
    if spec is None:
        return None
    return (spec.origin or "" if spec.has_location else ""), tuple(spec.submodule_search_locations or ())


def forget_places() -> None:
    """Look for modules anew: the user may have written some since."""
    _find.cache_clear()
    for found in (files_below, files_named, names_in):
        found.cache_clear()
    importlib.invalidate_caches()


def _files_of(dotted: list[str], names: tuple[str, ...], places: list[str]) -> list[str]:
    """The files of a dotted module, of the packages that it is in, and of those of `names` that are modules of it."""
    files: list[str] = []
    for number, part in enumerate(dotted):
        found = _find(part, tuple(places))
        if found is None:
            return files
        files += [found[0]] if found[0] else []
        places = list(found[1])
        if not places and number + 1 < len(dotted):
            return files
    if "*" in names:  # with what the package says that it is all of it
        files += [file for place in places for file in source_files(place) if os.path.dirname(file) == place]
    for name in names:
        if places and (found := _find(name, tuple(places))) is not None and found[0]:
            files.append(found[0])
    return files


def source_folder(file: str) -> str:
    """The folder that a file of the user's is seen with: of the whole package that it is in, else its own."""
    folder = os.path.dirname(file)
    while os.path.isfile(os.path.join(os.path.dirname(folder), "__init__.py")):
        folder = os.path.dirname(folder)
    return folder


def source_files(folder: str) -> list[str]:
    """All files of Python code below a folder."""
    return [file for file in files_below(folder) if file.endswith(".py")]


@cache
def files_below(folder: str) -> tuple[str, ...]:
    """All files below a folder, without run directories, which a sweep writes itself."""
    found: list[str] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NO_SOURCES)
        if SWEEP in names:
            folders.clear()
            continue
        found += [os.path.join(where, name) for name in sorted(names) if not name.startswith(".")]
        if len(found) > MOST_FILES:
            break
    return tuple(found)


@cache
def files_named(folder: str) -> dict[str, list[str]]:
    """The files below a folder, by their names."""
    found: dict[str, list[str]] = {}
    for file in files_below(folder):
        found.setdefault(os.path.basename(file), []).append(file)
    return found
