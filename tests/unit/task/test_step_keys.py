"""The laws of step keys: what can change a result changes a key, what cannot does not, in linear time, whatever it is."""

import ast
import copy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.key_pairs import ALL, BOTH, NONE, PAIRS, P, Pair, W
from support.planned import BUILD, HEAD, METRIC, PROGRAM, alone, keys_of

from bt_ray.step import StepKey
from bt_ray.task.fingerprint import digest
from bt_ray.task.fingerprint.graph import Mode
from bt_ray.task.fingerprint.values import Values

WANTED = {ALL: {"", "p", "w"}, NONE: set(), P: {"p"}, W: {"w"}, BOTH: {"p", "w"}}
PLAIN = {"task.py": HEAD + PROGRAM + METRIC + BUILD}


def differing(one: dict[str, StepKey], other: dict[str, StepKey]) -> set[str]:
    return {prefix for prefix in one if one[prefix].key != other[prefix].key}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_change_concerns_the_steps_that_it_can_change_and_no_other(pair: Pair) -> None:
    one, other = keys_of(pair.written(pair.a)), keys_of(pair.written(pair.b))
    assert differing(one, other) == WANTED[pair.want]


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        ("the body of forward", "function Program.forward in task.py"),
        ("a validator", "function Item.check in task.py"),
        ("temperature of an LM", "setting temperature of the LM openai/gpt-x"),
        ("a global constant", "value LIMIT in task.py"),
        ("a module of a package", "function clean in text.py"),
        ("a module imported in a function", "file text.py"),
        ("a file beside the code", "file words.txt"),
        ("a setting of the user's", "setting dspy.settings.depth"),
        ("the proposer of GEPA", "function propose in task.py"),
        ("the docstring of a model", "class Item in task.py"),
    ],
)
def test_what_changed_has_a_name(pair: str, name: str) -> None:
    (changed,) = (known for known in PAIRS if known.name == pair)
    one, other = keys_of(changed.written(changed.a)), keys_of(changed.written(changed.b))
    names = {
        name
        for prefix in one
        for name in one[prefix].reached
        if one[prefix].reached[name] != other[prefix].reached.get(name)
    }
    assert name in names


@pytest.mark.parametrize(
    ("values", "wanted"),
    [({"seed": 1}, ALL), ({"lm": {"max_tokens": 9}}, ALL), ({"train": {"epochs": 7}}, "w"), ({"num_threads": 3}, NONE)],
    ids=str,
)
def test_settings_concern_their_steps(values: dict[str, Any], wanted: str) -> None:
    assert differing(keys_of(PLAIN), keys_of(PLAIN, **values)) == WANTED[wanted]


def test_the_version_of_a_package_that_code_imports_concerns_what_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"task.py": PLAIN["task.py"].replace("    return example", "    import networkx\n    return example")}
    one = keys_of(files)
    monkeypatch.setattr(
        "bt_ray.task.fingerprint.functions.package_version", lambda name: "other" if name == "networkx" else ""
    )
    other = keys_of(files)
    assert "" in differing(one, other)
    assert one[""].reached["package networkx"] != other[""].reached["package networkx"]


# -- names of folders and of modules, in whatever place --

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)


@settings(max_examples=10)
@given(NAMES, NAMES)
def test_where_files_lie_changes_nothing(one: str, other: str) -> None:
    found = []
    for name in (one, other):
        with alone() as folder:
            (folder / name / "deeper").mkdir(parents=True)
            path = "HERE = str(Path(__file__).parent / 'x')"
            text = f"from pathlib import Path\n{HEAD}\n{path}\n{PROGRAM}{METRIC}    HERE\n{BUILD}"
            (folder / name / "deeper" / "task.py").write_text(text)
            found.append(keys_in(folder / name / "deeper"))
    assert differing(*found) == set()


def keys_in(folder: Path) -> dict[str, StepKey]:
    from bt_ray.driver.check import check_sweep
    from bt_ray.settings.config import make_config

    config = make_config({"task": f"{folder}/task.py:build", "strategies": ["p", "w"]})
    return check_sweep(config, None).first.keys


# -- values --

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner) | st.frozensets(st.text()),
    max_leaves=8,
)


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


@given(VALUES)
def test_a_copy_is_what_it_copies_shared_or_not(value: Any) -> None:
    assert digest(copy.deepcopy(value)) == digest(value)
    assert digest([value, copy.deepcopy(value)]) == digest([value, value])
    assert digest(Holder(value)) == digest(Holder(copy.deepcopy(value)))


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_arguments_and_attributes_by_name_means_nothing(values: dict[str, int]) -> None:
    turned = dict(reversed(values.items()))
    assert Values().read(values, Mode.KEYWORDS).digest == Values().read(turned, Mode.KEYWORDS).digest
    assert digest(values) != digest(turned), "that of data does: it may be shown, or walked"
    one, other = Holder(1), Holder(1)
    one.__dict__.update(values)
    other.__dict__.update(turned)
    assert digest(one) == digest(other)


@given(st.permutations([f"v{n}" for n in range(6)]))
def test_the_order_of_an_examples_fields_means_nothing(names: list[str]) -> None:
    written = {f"v{n}": n for n in range(6)}
    assert digest(dspy.Example({name: written[name] for name in names})) == digest(dspy.Example(written))


@given(st.integers(1, 30), st.integers(0, 29))
def test_a_knot_is_told_from_another_wherever_they_differ(size: int, at: int) -> None:
    def ring(odd: int | None) -> Holder:
        holders = [Holder(n == odd) for n in range(size)]
        for number, holder in enumerate(holders):
            holder.__dict__["next"] = holders[(number + 1) % size]
        return holders[0]

    assert digest(ring(None)) == digest(ring(None))
    assert (digest(ring(at)) == digest(ring(None))) == (at >= size)


class Hostile:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError


def a_generator() -> Iterator[int]:
    yield 1


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    "value",
    [Hostile(), threading.Lock(), threading.local(), a_generator(), deep(20_000), 10**5000, object(), dspy, dspy.settings,
     sys.stdin, Hostile, Holder(Hostile()), memoryview(b"a"), {1: 2}.keys(), type, Any, ..., float("nan")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_nothing_raises(value: Any) -> None:
    assert digest(value) == digest(value)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_tensor_is_its_numbers(kind: str) -> None:
    torch = pytest.importorskip("torch")

    def parameter(number: float) -> Any:
        return torch.nn.Parameter(torch.full((2, 2), number, dtype=getattr(torch, kind)))

    assert digest(parameter(1.0)) == digest(parameter(1.0))
    assert digest(parameter(1.0)) != digest(parameter(2.0))


def test_own_keys_that_raise_are_no_keys() -> None:
    class Raises(Holder):
        def __bt_ray_key__(self) -> str:
            raise RuntimeError

    assert digest(Raises(1))


def test_a_lazy_module_is_not_asked_for_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ModuleNotFoundError(f"{name} would import what is not installed")

    expected = keys_of(PLAIN)
    monkeypatch.setitem(sys.modules, "lazy_package.models", Lazy("lazy_package.models"))
    assert keys_of(PLAIN) == expected


# -- size: what is not linear does not end within these limits --


@pytest.mark.timeout(90)
def test_thousands_of_functions_that_call_each_other_have_a_key() -> None:
    count = 2000
    functions = "\n".join(
        f"def f{n}(text):\n    return text and f{(n * 7 + 1) % count}(text) or f{(n + 1) % count}(text) or {n}\n"
        for n in range(count)
    )
    metric = METRIC.replace("return example", "return f0(example.answer) and example")
    keys = keys_of({"task.py": HEAD + PROGRAM + functions + metric + BUILD})
    assert len([name for name in keys[""].reached if name.startswith("function f")]) == count


@pytest.mark.timeout(90)
def test_large_packages_in_the_tasks_folder_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = [Path(pytest.importorskip(name).__file__).parent for name in ("jinja2", "lark")]
    files = {
        f"{package.name}/{file.relative_to(package)}": file.read_text()
        for package in packages
        for file in package.rglob("*.py")
    }
    imported = METRIC.replace("    return", "    jinja2.Template('a').render()\n    lark.Lark('start: \"a\"')\n    return")
    files["task.py"] = HEAD + "import jinja2, lark\n" + PROGRAM + imported + BUILD
    for name in [name for name in sys.modules if name.partition(".")[0] in ("jinja2", "lark")]:
        monkeypatch.delitem(sys.modules, name)  # those that are installed
    keys = keys_of(files)
    assert any(name.endswith("in lark.py") for name in keys[""].reached), "the copies are what it sees"


# -- mutations --

RICH = '''
import dataclasses
import functools
import re
from typing import Literal

import pydantic

SPACES = re.compile(r"[ ]+")
WEIGHTS = {"exact": 1.0, "close": 0.5}


@dataclasses.dataclass
class Limits:
    low: int = 1
    high: int = 9


LIMITS = Limits(high=8)


def scaled(by, floor=0.25):
    def decorate(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            value = function(*args, **kwargs)
            return value * by if value > floor else floor
        return inner
    return decorate


def clean(text, *, upper=False):
    text = SPACES.sub("-", text)[LIMITS.low : LIMITS.high]
    return text.upper() if upper else text.lower()


@scaled(2)
def metric(example, prediction, trace=None):
    left, right = clean(example.answer), clean(prediction.answer)
    if left == right:
        return WEIGHTS["exact"]
    return WEIGHTS["close"] if left in right and len(right) < 40 else 0


class Kind(pydantic.BaseModel):
    name: Literal["x", "y"] = pydantic.Field("x", description="which")
    size: int = pydantic.Field(3, ge=1)


class Classify(dspy.Signature):
    """Say which."""

    question: str = dspy.InputField(desc="asked")
    answer: Kind = dspy.OutputField()


class Program(dspy.Module):
    tries = 2

    def __init__(self):
        super().__init__()
        self.classify = dspy.ChainOfThought(Classify, temperature=0.5)

    def forward(self, question):
        for _ in range(self.tries):
            found = self.classify(question=question + "?")
            if found.answer.size >= 2 or not found.answer.name:
                break
        return found


def program():
    return Program()
'''

OTHER: dict[Any, Any] = {ast.Eq: ast.NotEq, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.In: ast.NotIn,
         ast.Mult: ast.Add, ast.Add: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
         ast.Mod: ast.Add, ast.Sub: ast.Add, ast.Not: ast.USub}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """The source with one constant, operator or name changed, for each, and what that was."""
    for number, node in enumerate(ast.walk(ast.parse(source))):
        tree = ast.parse(source)
        if changed(list(ast.walk(tree))[number]):
            yield ast.unparse(node), ast.unparse(tree)


def changed(node: Any) -> bool:
    """Change a node to another of its kind; returns whether it is one that can be changed."""
    match node:
        case ast.Constant(value=value):
            node.value = other_constant(value)
        case ast.Compare():
            node.ops[0] = OTHER[type(node.ops[0])]()
        case ast.BinOp() | ast.BoolOp() | ast.UnaryOp() if type(node.op) in OTHER:
            node.op = OTHER[type(node.op)]()
        case ast.Name(ctx=ast.Load()):
            node.id = "len" if node.id != "len" else "repr"
        case ast.Attribute(ctx=ast.Load()):
            node.attr += "_"
        case ast.keyword(arg=str()):
            node.arg += "_"
        case _:
            return False
    return True


def other_constant(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if value is None:
        return 0
    return value + "x" if isinstance(value, str) else value + 1


def survivors(source: str, **files: str) -> set[str]:
    """The mutations of a task that leave all keys what they are."""
    before = {prefix: key.key for prefix, key in keys_of({**files, "task.py": source}).items()}
    found = set()
    for what, text in mutants(source):
        try:
            after = {prefix: key.key for prefix, key in keys_of({**files, "task.py": text}).items()}
        except Exception:  # a task that cannot be built takes nobody's step
            continue
        if before == after:
            found.add(what)
    return found


def docstrings(source: str) -> set[str]:
    """The docstrings of a module and of its functions, as `mutants` names them."""
    tree = ast.parse(source)
    documented = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef))]
    first = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    return {ast.unparse(node.value) for node in first if isinstance(node, ast.Expr)}


def test_every_change_of_a_rich_task_changes_a_key() -> None:
    assert survivors(HEAD + RICH + BUILD) == {"'none'"}, "no answer depends on the key of the API"


def test_every_change_of_the_demos_task_changes_a_key() -> None:
    source = (ROOT / "scripts/iris/task.py").read_text()
    flowers = (ROOT / "scripts/iris/iris.csv").read_text()
    program = "    program = dspy.Predict(ClassifyIris)\n"
    assert program in source
    source = source.replace(program, f'{program}    program.set_lm(dspy.LM("openai/m"))\n')
    left = survivors(source, **{"iris.csv": flowers})
    assert left == docstrings(source) | {"100"}, "where the testset begins, which no step sees"
