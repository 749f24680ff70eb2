"""What a function is to a key: its code, what it holds, and what it mentions, in the user's modules and files."""

import copyreg
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

from bt_ray.task.fingerprint.code import (
    Code,
    files_below,
    files_named,
    find_imports,
    is_installed,
    is_users_function,
    is_users_module,
    names_in,
    own_attribute,
    package_version,
    read_code,
    read_source,
    source_files,
    source_folder,
)
from bt_ray.task.fingerprint.graph import ByValue, Mode, Node, Ref
from bt_ray.task.fingerprint.secrets import is_of_a_client, is_secret

OF_A_MODULE = {
    "__builtins__", "__cached__", "__file__", "__loader__", "__name__", "__package__", "__path__", "__spec__",
}  # fmt: skip
"""Names that Python gives each module, which say where it lies."""
READS_MODULES = {"__dict__", "attrgetter", "getattr", "vars"}
"""Names by which code reads what it does not mention from the modules that it does."""
READS_DOCUMENTATION = {
    "Avatar", "Flex", "RLM", "ReAct", "ReActV2", "Tool", "__doc__", "getdoc",
}  # fmt: skip
"""Names by which code brings functions' documentation into prompts."""
WRITES = {
    "FileHandler", "dump", "mkdir", "save", "savetxt", "to_csv", "to_json", "to_parquet", "to_pickle", "touch", "unlink",
    "write", "write_bytes", "write_text", "writelines", "writerow", "writerows",
}  # fmt: skip
"""Names by which code writes files."""
READS_ENVIRONMENT = {"environ", "getenv"}
ENVIRONMENT = re.compile(r"[A-Za-z_]\w*")
OF_A_MACHINE = re.compile(r"(^|_)(CUDA|DIR|HOME|HOST|HOSTNAME|PATH|PID|PORT|PWD|RAY|TMPDIR|URI|URL|USER)(_|$)")
"""Variables of the environment that are others on other machines, or in other processes."""
NOT_OPAQUE = (str, bytes, int, float, list, tuple, dict, set, frozenset, type, ModuleType, FunctionType, BuiltinFunctionType,
              MethodType, CodeType, type(None), MethodWrapperType)  # fmt: skip
READS = {
    "FileSystemLoader", "glob", "iterdir", "listdir", "load", "open", "read_bytes", "read_csv", "read_json", "read_jsonl",
    "read_parquet", "read_text", "rglob", "scandir", "walk",
}  # fmt: skip
"""Names by which code reads files."""
END_OF_NAME = re.compile(r"[*/]*\.\w{1,10}")
MOST_NAMES = 1000
"""In a list or a dict of names of files."""
READS_SOURCE = {"CodeAct", "Refine", "getsource", "getsourcelines"}
"""Names by which code brings functions' source into prompts."""


@dataclass(frozen=True)
class SourceFile(ByValue):
    """A file of the user's: code, which is compiled and not run, or data."""

    path: str


@dataclass(frozen=True)
class SourceFolder(ByValue):
    """All code of the user's below a folder, for what cannot be seen through."""

    path: str


@dataclass(frozen=True)
class Package(ByValue):
    """An installed package, by the name that is imported."""

    name: str


def package_of(module: str) -> Package:
    return Package(module.partition(".")[0])


def expand_package(package: Package) -> Node:
    return Node(f"package {package.name} {package_version(package.name)}", name=f"package {package.name}")


def expand_function(function: FunctionType, mode: Mode) -> Node:
    """A function of the user's, or one of an installed package with what it holds: a decorator's holds what it decorates."""
    code = function.__code__
    inner = Mode.KEYWORDS if mode is Mode.KEYWORDS else Mode.PLAIN
    held = [Ref(value, inner) if present else "empty" for value, present in _cells(function)]
    attributes = pairs({name: Ref(value) for name, value in vars(function).items()})
    if is_installed(code.co_filename):
        home = str(function.__globals__.get("__name__", "builtins"))  # its `__module__` is that of what it decorates
        label = f"function {home}.{code.co_qualname}"
        return Node(label, [Ref(package_of(home)), attributes, *held])
    read = read_code(code)
    module = sys.modules.get(function.__module__ or "")
    documentation = inspect.cleandoc(function.__doc__) if isinstance(function.__doc__, str) else ""
    counted = documentation if mode is Mode.TOOL else ""
    label = f"function {function.__qualname__} {read.digest} {counted}"
    mentioned, named = mentions(read, function.__globals__, code.co_filename)
    annotations = function.__annotations__
    travels = function.__module__ == "__main__"  # and what only such a text mentions does not
    texts = " ".join(text for text in annotations.values() if isinstance(text, str) and not travels)
    children = [
        Ref(function.__defaults__),
        pairs({name: Ref(value) for name, value in (function.__kwdefaults__ or {}).items()}),
        pairs({name: Ref(value, Mode.TYPE) for name, value in annotations.items()}),
        attributes,
        read_text_annotation(texts, function.__globals__),
        *held,
        *find_named_files(
            [value for value, _ in _cells(function)] + [function.__defaults__, function.__kwdefaults__], code.co_filename
        ),
        *mentioned,
    ]
    return Node(
        label,
        children,
        name=f"function {function.__qualname__} in {_file_name(code.co_filename, module)}",
        documentation=documentation,
        source=lambda: source_text(function),
        reads_documentation=bool(read.names & READS_DOCUMENTATION),
        reads_source=bool(read.names & READS_SOURCE),
        named=named,
    )


def source_text(written: Any) -> str:
    """The source of a function or a class as it is written; `""` where there is none."""
    try:
        return inspect.getsource(written)
    except (OSError, TypeError, IndexError, SyntaxError):
        return ""


def _cells(function: FunctionType) -> Iterator[tuple[Any, bool]]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents, True
        except ValueError:
            yield None, False


def mentions(read: Code, variables: Mapping[str, Any], file: str) -> tuple[list[Any], dict[str, Any]]:
    """What code mentions: values of its module's variables, what it imports while it runs, files; and values by name."""
    folder = os.path.dirname(file) if os.path.isfile(file) else ""
    shown = _file_name(file, None)
    children: list[Any] = []
    named: dict[str, Any] = {}
    values = {}
    for name, value in _values(read.variables, read.names, variables, set()):
        values[name] = Ref(value)
        if not callable(value) and not isinstance(value, ModuleType):
            named[f"value {name} in {shown}"] = Ref(value)
    for chain in read.chains:
        if (module := _module_at(chain, variables)) is not None:
            values[".".join(chain)] = Ref(module)
    children.append(pairs(values))
    if variables.get("__name__") != "__main__":  # with a function that is sent, what only its texts mention does not travel
        children.append(read_text_annotation(" ".join(text for text in read.texts if "->" in text), variables))
    if folder and any(_is_opaque(ref.value) for ref in values.values()):
        children.append(Ref(SourceFile(file)))
    if read.names & READS_ENVIRONMENT:
        children.append(pairs({name: Ref(os.environ.get(name)) for name in read.texts if _is_setting(name)}))
    children += find_named_files([*read.texts, *(ref.value for ref in values.values())], file)
    found = find_imports(read.imports, folder)
    children += [Ref(SourceFile(path)) for path in found.files]
    children += [Ref(Package(name)) for name in found.packages]
    if not read.is_seen_through and folder:
        children.append(Ref(SourceFolder(source_folder(file))))
    return children, named


def _values(
    taken: frozenset[str], names: frozenset[str], variables: Mapping[str, Any], seen: set[int]
) -> Iterator[tuple[str, Any]]:
    """The values that code takes from its module's variables, and from modules of the user's among them.

    Args:
        taken: The variables that it takes. Others are not looked at: they do not travel with a function that is sent.
        names: All names in it.
        variables: The module's.
        seen: The ids of the modules that were looked at.
    """
    for name in sorted((taken & variables.keys()) - OF_A_MODULE):
        value = variables[name]
        if not isinstance(value, ModuleType) or not is_users_module(value):
            if not is_secret(name, value):
                yield name, value
            if isinstance(value, ModuleType):
                yield from ((f"{name}.{inner}", item) for inner, item in _patches(names, value))
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if names & READS_MODULES or "__getattr__" in vars(value):
            yield name, value
        for inner, item in _values(names, names, vars(value), seen):
            yield f"{name}.{inner}", item


def _module_at(chain: tuple[str, ...], variables: Mapping[str, Any]) -> ModuleType | None:
    """The module of the user's that code hands on as a value, as `f(a.b)` does: what is taken of it then, is not seen."""
    found = variables.get(chain[0])
    for name in chain[1:]:
        found = own_attribute(found, name) if isinstance(found, ModuleType) and is_users_module(found) else None
    return found if isinstance(found, ModuleType) and is_users_module(found) else None


def _patches(names: frozenset[str], module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What a user put into an installed module, or into a class there, so far as code names it."""
    for name in sorted(names & vars(module).keys()):
        item = vars(module)[name]
        members = vars(item).values() if isinstance(item, type) else (item,)
        if any(map(is_users_function, members)):
            yield name, item


def _is_opaque(value: Any) -> bool:
    """Whether no state says what an object holds, as of a connection or an open file; locks hold nothing."""
    kind: Any = type(value)
    if isinstance(value, NOT_OPAQUE) or kind.__module__ == "_thread":
        return False
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return False
    if kind in copyreg.dispatch_table:
        return False
    try:
        value.__reduce_ex__(4)
    except Exception:
        return True
    return False


def _is_setting(name: str) -> bool:
    """Whether a text may be the name of a variable of the environment that tells what to do, not where things are."""
    return ENVIRONMENT.fullmatch(name) is not None and not is_of_a_client(name) and not OF_A_MACHINE.search(name)


def read_text_annotation(text: str, variables: Mapping[str, Any]) -> Node:
    """What annotations mention that are written as texts."""
    names = set(re.findall(r"\w+", text)) & variables.keys()
    return pairs({name: Ref(variables[name], Mode.TYPE) for name in names if not isinstance(variables[name], ModuleType)})


def expand_module(module: ModuleType) -> Node:
    """A module as a value: of the user's the whole file, of others the package's version."""
    file = own_attribute(module, "__file__")
    if not is_users_module(module):
        return Node(f"module {module.__name__}", [Ref(package_of(module.__name__))])
    if not isinstance(file, str):
        folders = sorted(own_attribute(module, "__path__") or ())
        return Node("module", [Ref(SourceFolder(str(folder))) for folder in folders] or [module.__name__])
    is_package = own_attribute(module, "__path__") is not None
    return Node("module", [Ref(SourceFolder(os.path.dirname(file)) if is_package else SourceFile(file))])


def expand_source_file(source: SourceFile) -> Node:
    name = os.path.basename(source.path)
    read = read_source(source.path) if name.endswith(".py") else None
    if read is None:
        return Node(f"file {file_digest(source.path)}", name=f"file {name}")
    folder = os.path.dirname(source.path)
    found = find_imports(read.imports, folder)
    children: list[Any] = [Ref(SourceFile(path)) for path in found.files]
    children += [Ref(Package(package)) for package in found.packages]
    children += find_named_files(read.texts, source.path)
    if not read.is_seen_through:
        children.append(Ref(SourceFolder(source_folder(source.path))))
    return Node(
        f"source {read.digest}",
        children,
        name=f"file {name}",
        source=lambda: file_digest(source.path),
        documentation=file_digest(source.path),
        reads_documentation=bool(read.names & READS_DOCUMENTATION),
        reads_source=bool(read.names & READS_SOURCE),
    )


def expand_source_folder(folder: SourceFolder) -> Node:
    files = source_files(folder.path)
    return Node("folder", [Node(os.path.relpath(file, folder.path), [Ref(SourceFile(file))]) for file in files])


def expand_code(code: CodeType) -> Node:
    read = read_code(code)
    return Node(f"code {read.digest}", mentions(read, {}, code.co_filename)[0])


def pairs(values: Mapping[str, Any]) -> Node:
    """Values by name, in whatever order."""
    return Node("names", [Node(name, [value]) for name, value in values.items()], unordered=True)


def file_digest(path: str) -> str:
    """A hash of a file's content; what it is instead, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return type(error).__name__


def find_named_files(names: Iterable[Any], code: str) -> list[Ref]:
    """The files that texts and paths among these name, where code of the file `code` names them.

    Code that writes files may write these: then they are not what it depends on. Where code reads files, a folder that it
    names counts with all that is in it, and the end of a name, as in `f"{name}.txt"`, with all files that end so.
    """
    texts = {str(name) for name in _texts_among(names, 0) if 0 < len(str(name)) < 256}
    texts = {text for text in texts if "\n" not in text and "\0" not in text}
    if not texts:
        return []
    mentioned = names_in(code)
    reads, folder = bool(mentioned & READS), os.path.dirname(code)
    paths = {path: None for text in sorted(texts) for path in _find_named(text, folder, reads=reads)}
    return [] if not paths or mentioned & WRITES else [Ref(SourceFile(path)) for path in paths]


def _texts_among(values: Iterable[Any], level: int) -> Iterator[str | PurePath]:
    for value in values:
        if isinstance(value, str | PurePath):
            yield value
        elif level < 2 and type(value) in (dict, list, tuple, set, frozenset) and len(value) <= MOST_NAMES:
            yield from _texts_among(value.values() if isinstance(value, dict) else value, level + 1)


def _find_named(name: str, folder: str, *, reads: bool) -> Iterable[str]:
    """The files of that name, relative to a folder, below it, or relative to the working directory."""
    for path in (os.path.abspath(os.path.join(folder, name)), os.path.abspath(name)):
        if ("." in name or reads) and os.path.isfile(path):
            return [] if is_installed(path) else [path]
    if not folder or not name.strip("*/. "):
        return ()
    named = os.path.abspath(os.path.join(folder, name))
    if reads and os.path.isdir(named) and not f"{folder}/".startswith(f"{named}/"):
        return files_below(named)
    if reads and END_OF_NAME.fullmatch(name):
        return [file for file in files_below(folder) if file.endswith(name.lstrip("*/"))]
    return [file for file in files_named(folder).get(os.path.basename(name), ()) if file.endswith(f"/{name}")]


def _file_name(file: str, module: ModuleType | None) -> str:
    return os.path.basename(file) if not file.startswith("<") else getattr(module, "__name__", "the notebook")
