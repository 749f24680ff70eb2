"""Pairs of tasks that differ in one thing, and the steps whose keys must differ for it: no other may, and no fewer.

A pair's text has `@@` where `a` and `b` stand. What a task must have is in `support.planned`: HEAD, program, metric, BUILD.
"""

from dataclasses import dataclass, field

from support.planned import BUILD, HEAD, METRIC, PROGRAM

ALL, P, W, BOTH, NONE = "all", "p", "w", "p and w", "none"


@dataclass(frozen=True)
class Pair:
    name: str
    a: str
    b: str
    want: str = ALL
    program: str = PROGRAM
    metric: str = METRIC
    build: str = BUILD
    head: str = HEAD
    files: dict[str, str] = field(default_factory=dict)

    def written(self, value: str) -> dict[str, str]:
        texts = {"task.py": self.head + self.program + self.metric + self.build, **self.files}
        return {name: text.replace("@@", value) for name, text in texts.items()}


def of_program(name: str, made: str, a: str, b: str, want: str = ALL, before: str = "") -> Pair:
    """The program is `made`, after what is written `before` it."""
    return Pair(name, a, b, want, program=f"{before}\ndef program():\n    return {made}\n")


def of_field(name: str, written: str, a: str, b: str, want: str = ALL, before: str = "") -> Pair:
    """An output field is `written`."""
    fields = f"    question: str = dspy.InputField()\n    {written}\n"
    signature = f'{before}\n\nclass Sig(dspy.Signature):\n    """Answer."""\n\n{fields}'
    return of_program(name, "dspy.Predict(Sig)", a, b, want, "import enum, dataclasses, typing, pydantic\n" + signature)


def of_metric(
    name: str, body: str, a: str, b: str, want: str = ALL, before: str = "", files: dict[str, str] | None = None
) -> Pair:
    """The metric returns `body`, after what is written `before` it."""
    metric = f"{before}\n\ndef metric(example, prediction, trace=None):\n    {body}\n"
    return Pair(name, a, b, want, metric=metric, files=files or {})


def of_lm(name: str, argument: str, a: str, b: str, want: str = ALL, before: str = "") -> Pair:
    head = HEAD.replace("\nLM =", f"\n{before}\nLM =").replace('api_key="none"', f'api_key="none", {argument}')
    return Pair(name, a, b, want, head=head)


def of_settings(name: str, configured: str, a: str, b: str, want: str = ALL, before: str = "") -> Pair:
    build = BUILD.replace("    made = program()", f"    dspy.configure({configured})\n    made = program()")
    return Pair(name, a, b, want, build=before + build)


P_DEFAULT = "BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=2)"


def of_p(name: str, made: str, a: str, b: str, want: str = P, before: str = "") -> Pair:
    """The optimizer `p` is `made`, after what is written `before` it."""
    build = before + BUILD.replace(P_DEFAULT, made)
    five = METRIC.replace("trace=None", "trace=None, pred_name=None, pred_trace=None")
    return Pair(name, a, b, want, build=build, metric=five)


def of_w(name: str, arguments: str, a: str, b: str, want: str = W) -> Pair:
    build = BUILD.replace("BootstrapFinetune(metric=metric)", f"BootstrapFinetune(metric=metric, {arguments})")
    return Pair(name, a, b, want, build=build)


def of_task(name: str, argument: str, a: str, b: str, want: str, before: str = "") -> Pair:
    """`bt_ray.Task` has a further argument."""
    return Pair(
        name, a, b, want, build=before + BUILD.replace("optimizers=optimizers)", f"optimizers=optimizers, {argument})")
    )


def of_examples(name: str, made: str, a: str, b: str, want: str = ALL) -> Pair:
    """A training example is `made`."""
    return Pair(name, a, b, want, build=BUILD.replace('dspy.Example(question=f"q{n}", answer=str(n))', made))


TOOL = '''

def look_up(name: str) -> str:
    """Look a name up."""
    return name.upper()


def count(name: str) -> int:
    """Count."""
    return len(name)
'''
REWARD = """

def reward(args, prediction):
    return float(len(prediction.answer) @@ 3)
"""
REWARD_WITH = """

def reward(args, prediction):
    # @@
    return float(len(prediction.answer) > 3)
"""
MODULE = '''

class Program(dspy.Module):
    """A program."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.answer(question=question)
'''
EMBED = """
import numpy as np


def embed(texts):
    return np.array([[len(text) @@ 7, 1.0] for text in texts])
"""
KNN_PROGRAM = (
    EMBED
    + """
DEMOS = [dspy.Example(question="a", answer="b").with_inputs("question")]


class Near(dspy.Module):
    def __init__(self):
        self.answer = dspy.Predict("question -> answer")
        self.near = dspy.KNN({k}, DEMOS, dspy.Embedder(embed))

    def forward(self, question):
        return self.answer(question=question, demos=self.near(question=question))
"""
)
ITEM = '''

class Item(pydantic.BaseModel):
    """An item."""

    name: str = pydantic.Field(description="its name")
    kind: typing.Literal["a", "b"] = "a"
'''

MODULES = [
    of_program("an argument of Predict", 'dspy.Predict("question -> answer", temperature=@@)', "0.1", "0.9"),
    of_program("another module", 'dspy.@@("question -> answer")', "Predict", "ChainOfThought"),
    of_program(
        "the rationale of ChainOfThought",
        'dspy.ChainOfThought("question -> answer", rationale_field=dspy.OutputField(desc="@@"))',
        "short",
        "long",
    ),
    of_program(
        "ReAct's max_iters", 'dspy.ReAct("question -> answer", tools=[look_up], max_iters=@@)', "3", "4", before=TOOL
    ),
    of_program(
        "the order of ReAct's tools",
        'dspy.ReAct("question -> answer", tools=[@@])',
        "look_up, count",
        "count, look_up",
        before=TOOL,
    ),
    of_program(
        "a tool's docstring",
        'dspy.ReAct("question -> answer", tools=[look_up])',
        "Look",
        "Search",
        before=TOOL.replace("Look a", "@@ a"),
    ),
    of_program(
        "a comment in a tool",
        'dspy.ReAct("question -> answer", tools=[look_up])',
        "one",
        "two",
        NONE,
        before=TOOL.replace("    return name", "    # @@\n    return name"),
    ),
    of_program(
        "a tool's body",
        'dspy.ReAct("question -> answer", tools=[look_up])',
        "upper",
        "lower",
        before=TOOL.replace("upper", "@@"),
    ),
    of_program(
        "the type of a tool's argument",
        'dspy.ReAct("question -> answer", tools=[look_up])',
        "str",
        "list[str]",
        before=TOOL.replace("look_up(name: str)", "look_up(name: @@)"),
    ),
    of_program(
        "a name that dspy.Tool is given",
        'dspy.ReAct("question -> answer", tools=[dspy.Tool(count, name="@@")])',
        "n",
        "m",
        before=TOOL,
    ),
    of_program(
        "what dspy.Tool says of an argument",
        'dspy.ReAct("question -> answer", tools=[dspy.Tool(count, arg_desc={"name": "@@"})])',
        "n",
        "m",
        before=TOOL,
    ),
    of_program(
        "ReActV2's max_iters", 'dspy.ReActV2("question -> answer", tools=[count], max_iters=@@)', "3", "4", before=TOOL
    ),
    of_program(
        "the N of Refine",
        'dspy.Refine(dspy.Predict("question -> answer"), N=@@, reward_fn=len, threshold=1.0)'.replace("len", "reward"),
        "2",
        "3",
        before=REWARD.replace("@@", ">"),
    ),
    of_program(
        "the threshold of Refine",
        'dspy.Refine(dspy.Predict("question -> answer"), N=2, reward_fn=reward, threshold=@@)',
        "0.5",
        "1.0",
        before=REWARD.replace("@@", ">"),
    ),
    of_program(
        "the reward of Refine",
        'dspy.Refine(dspy.Predict("question -> answer"), N=2, reward_fn=reward, threshold=1.0)',
        ">",
        "<",
        before=REWARD,
    ),
    of_program(
        "a comment in the reward of Refine, which is in its prompts",
        'dspy.Refine(dspy.Predict("question -> answer"), N=2, reward_fn=reward, threshold=1.0)',
        "one",
        "two",
        before=REWARD_WITH,
    ),
    of_program(
        "a comment in the reward of BestOfN, which is not",
        'dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=reward, threshold=1.0)',
        "one",
        "two",
        NONE,
        before=REWARD_WITH,
    ),
    of_program(
        "the fail_count of BestOfN",
        'dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=reward, threshold=1.0, fail_count=@@)',
        "1",
        "2",
        before=REWARD.replace("@@", ">"),
    ),
    of_program(
        "the reward of BestOfN",
        'dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=reward, threshold=1.0)',
        ">",
        ">=",
        before=REWARD,
    ),
    of_program("the M of MultiChainComparison", 'dspy.MultiChainComparison("question -> answer", M=@@)', "2", "3"),
    of_program(
        "the temperature of MultiChainComparison",
        'dspy.MultiChainComparison("question -> answer", temperature=@@)',
        "0.2",
        "0.3",
    ),
    *(
        of_program(f"the {name} of RLM", f'dspy.RLM("question -> answer", {name}=@@)', "20", "30")
        for name in ("max_iters", "max_llm_calls", "max_output_chars")
    ),
    of_program("the sub_lm of RLM", 'dspy.RLM("question -> answer", sub_lm=dspy.LM("openai/@@"))', "a", "b"),
    of_program(
        "the docstring of a tool of RLM",
        'dspy.RLM("question -> answer", tools=[count])',
        "Count.",
        "Measure.",
        before=TOOL.replace("Count.", "@@"),
    ),
    of_program(
        "the max_iters of CodeAct", 'dspy.CodeAct("question -> answer", tools=[count], max_iters=@@)', "3", "4", before=TOOL
    ),
    of_program(
        "a comment in a tool of CodeAct, which runs its source",
        'dspy.CodeAct("question -> answer", tools=[count])',
        "one",
        "two",
        before=TOOL.replace("    return len", "    # @@\n    return len"),
    ),
    of_program("the max_iters of ProgramOfThought", 'dspy.ProgramOfThought("question -> answer", max_iters=@@)', "3", "4"),
    of_program(
        "the interpreter of ProgramOfThought",
        'dspy.ProgramOfThought("question -> answer", interpreter_factory=lambda: dspy.PythonInterpreter(sync_files=@@))',
        "True",
        "False",
    ),
    of_program("the k of KNN", "Near()", "1", "2", before=KNN_PROGRAM.replace("@@", "%").replace("{k}", "@@")),
    of_program("the vectorizer of KNN", "Near()", "%", "//", before=KNN_PROGRAM.replace("{k}", "1")),
    of_program(
        "the max_errors of Parallel",
        "Both()",
        "1",
        "2",
        before=MODULE.replace("Program", "Both").replace(
            "        super", "        self.all = dspy.Parallel(max_errors=@@)\n        super"
        ),
    ),
    of_program(
        "the corpus of a retriever",
        "Both()",
        "b",
        "c",
        before=EMBED.replace("@@", "%")
        + MODULE.replace("Program", "Both").replace(
            "        super", '        self.find = dspy.Embeddings(["a", "@@"], dspy.Embedder(embed), k=1)\n        super'
        ),
    ),
    of_program(
        "the k of a retriever",
        "Both()",
        "1",
        "2",
        before=EMBED.replace("@@", "%")
        + MODULE.replace("Program", "Both").replace(
            "        super", '        self.find = dspy.Embeddings(["a", "b"], dspy.Embedder(embed), k=@@)\n        super'
        ),
    ),
    of_program(
        "the model of an Embedder",
        "Both()",
        "small",
        "large",
        before=MODULE.replace("Program", "Both").replace(
            "        super", '        self.e = dspy.Embedder("openai/@@")\n        super'
        ),
    ),
    of_program(
        "the key of an Embedder",
        "Both()",
        "a",
        "b",
        NONE,
        before='\nE = dspy.Embedder("openai/e", api_key="@@")\n'
        + MODULE.replace("Program", "Both").replace("        super", "        self.e = E\n        super"),
    ),
    of_program(
        "a demo",
        "made()",
        "2",
        "3",
        before="""

def made():
    made = dspy.Predict("question -> answer")
    made.demos = [dspy.Example(question="1", answer="@@")]
    return made
""",
    ),
    of_program(
        "the body of forward",
        "Program()",
        "question",
        "question + '?'",
        before=MODULE.replace("question=question)", "question=@@)"),
    ),
    of_program(
        "the docstring of a module",
        "Program()",
        "A program.",
        "The program.",
        NONE,
        before=MODULE.replace("A program.", "@@"),
    ),
    of_program("a comment in a module", "Program()", "one", "two", NONE, before=MODULE + "\n    # @@\n"),
    of_program("a class attribute", "Program()", "1", "2", before=MODULE + "\n    depth = @@\n"),
    of_program(
        "an attribute of an instance",
        "Program()",
        "1",
        "2",
        before=MODULE.replace("        super", "        self.depth = @@\n        super"),
    ),
    of_program(
        "a cached property",
        "Program()",
        "1",
        "2",
        before="\nimport functools" + MODULE + "\n    @functools.cached_property\n    def depth(self):\n        return @@\n",
    ),
    of_program(
        "a static method",
        "Program()",
        "1",
        "2",
        before=MODULE + "\n    @staticmethod\n    def depth():\n        return @@\n",
    ),
    of_program(
        "a class method",
        "Program()",
        "1",
        "2",
        before=MODULE + "\n    @classmethod\n    def depth(cls):\n        return @@\n",
    ),
    of_program(
        "the setter of a property",
        "Program()",
        "1",
        "2",
        before=MODULE
        + """
    @property
    def depth(self):
        return 1

    @depth.setter
    def depth(self, value):
        self.value = value + @@
""",
    ),
    of_program("a base class", "Sub()", "1", "2", before=MODULE + "\n    depth = @@\n\n\nclass Sub(Program):\n    pass\n"),
    of_program(
        "the docstring of a tool that forward makes a ReAct of",
        "Program()",
        "Count.",
        "Measure.",
        before=TOOL.replace("Count.", "@@")
        + MODULE.replace("return self", 'dspy.ReAct("a -> b", tools=[count])\n        return self'),
    ),
]

FIELDS = [
    of_program("an instruction", 'dspy.Predict(dspy.Signature("question -> answer", "@@"))', "Answer.", "Answer!"),
    of_field("the description of a field", 'answer: str = dspy.OutputField(desc="@@")', "a word", "a number"),
    of_field("the prefix of a field", 'answer: str = dspy.OutputField(prefix="@@:")', "A", "B"),
    of_field("the type of a field", "answer: @@ = dspy.OutputField()", "str", "int"),
    of_field(
        "the order of fields",
        "@@",
        "a: str = dspy.OutputField()\n    b: str = dspy.OutputField()",
        "b: str = dspy.OutputField()\n    a: str = dspy.OutputField()",
    ),
    of_field("a bound of a field", "answer: int = dspy.OutputField(ge=@@)", "1", "2"),
    of_field("the order of literals", "answer: typing.Literal[@@] = dspy.OutputField()", '"a", "b"', '"b", "a"'),
    of_field(
        "the docstring of a model",
        "answer: list[Item] = dspy.OutputField()",
        "An item.",
        "Any item.",
        before=ITEM.replace("An item.", "@@"),
    ),
    of_field(
        "a description in an optional model",
        "answer: Item | None = dspy.OutputField()",
        "its name",
        "the name",
        before=ITEM.replace("its name", "@@"),
    ),
    of_field(
        "an option in a model of a dict",
        "answer: dict[str, Item] = dspy.OutputField()",
        "b",
        "c",
        before=ITEM.replace('"b"', '"@@"'),
    ),
    of_field("a default of a model", "answer: Item = dspy.OutputField()", "a", "b", before=ITEM.replace('= "a"', '= "@@"')),
    of_field(
        "the bound of a model's field",
        "answer: Item = dspy.OutputField()",
        "3",
        "4",
        before=ITEM + "    size: int = pydantic.Field(gt=@@)\n",
    ),
    of_field(
        "the alias of a model's field",
        "answer: Item = dspy.OutputField()",
        "a",
        "b",
        before=ITEM + '    size: int = pydantic.Field(alias="@@")\n',
    ),
    of_field(
        "a validator",
        "answer: Item = dspy.OutputField()",
        "lower",
        "upper",
        before=ITEM
        + """
    @pydantic.field_validator("name")
    @classmethod
    def check(cls, value):
        return value.@@()
""",
    ),
    of_field(
        "when a validator comes",
        "answer: Item = dspy.OutputField()",
        "before",
        "after",
        before=ITEM
        + """
    @pydantic.field_validator("name", mode="@@")
    @classmethod
    def check(cls, value):
        return value
""",
    ),
    of_field(
        "the configuration of a model",
        "answer: Item = dspy.OutputField()",
        "forbid",
        "ignore",
        before=ITEM + '    model_config = pydantic.ConfigDict(extra="@@")\n',
    ),
    of_field(
        "a model's annotation",
        "answer: Item = dspy.OutputField()",
        "short",
        "long",
        before=ITEM + '    size: typing.Annotated[int, pydantic.Field(description="@@")] = 1\n',
    ),
    of_field(
        "a model in a model",
        "answer: Outer = dspy.OutputField()",
        "its name",
        "the name",
        before=ITEM.replace("its name", "@@") + "\n\nclass Outer(pydantic.BaseModel):\n    items: list[Item]\n",
    ),
    of_field(
        "an enum's value", "answer: Kind = dspy.OutputField()", "a", "b", before='\n\nclass Kind(enum.Enum):\n    A = "@@"\n'
    ),
    of_field(
        "the order of an enum",
        "answer: Kind = dspy.OutputField()",
        'A = "a"\n    B = "b"',
        'B = "b"\n    A = "a"',
        before="\n\nclass Kind(enum.Enum):\n    @@\n",
    ),
    of_field(
        "an enum's docstring",
        "answer: Kind = dspy.OutputField()",
        "Kinds.",
        "All kinds.",
        before='\n\nclass Kind(enum.Enum):\n    """@@"""\n    A = "a"\n',
    ),
    of_field(
        "the docstring of a dataclass in a field",
        "answer: Pair = dspy.OutputField()",
        "Two.",
        "A pair.",
        before='\n\n@dataclasses.dataclass\nclass Pair:\n    """@@"""\n    a: int\n',
    ),
    of_field(
        "a field of a typed dict",
        "answer: Pair = dspy.OutputField()",
        "int",
        "str",
        before="\nfrom typing_extensions import TypedDict\n\nclass Pair(TypedDict):\n    a: @@\n",
    ),
    of_field("criteria of a decision", "answer: dspy.adapters.types.Code[@@] = dspy.OutputField()", '"python"', '"java"'),
    of_field(
        "nothing, with a model in another folder",
        "answer: typing.Optional[Item] = dspy.OutputField()",
        "",
        "",
        NONE,
        before=ITEM,
    ),
    of_field("a comment in a model", "answer: Item = dspy.OutputField()", "one", "two", NONE, before=ITEM + "    # @@\n"),
]

LMS = [
    Pair("the model of an LM", "gpt-x", "gpt-y", head=HEAD.replace("gpt-x", "@@")),
    *(
        of_lm(f"{name} of an LM", f"{name}=@@", a, b)
        for name, a, b in [
            ("model_type", '"chat"', '"text"'),
            ("temperature", "0.1", "0.2"),
            ("top_p", "0.1", "0.2"),
            ("stop", '["a"]', '["b"]'),
            ("n", "1", "2"),
            ("num_retries", "1", "2"),
            ("cache", "True", "False"),
            ("use_developer_role", "True", "False"),
            ("finetuning_model", '"a"', '"b"'),
            ("seed", "1", "2"),
            ("max_completion_tokens", "100", "200"),
            ("logit_bias", '{"1": 2}', '{"1": 3}'),
            ("eos_token", '"a"', '"b"'),
            ("extra_body", '{"top_k": 1}', '{"top_k": 2}'),
            ("launch_kwargs", '{"a": 1}', '{"a": 2}'),
            ("train_kwargs", '{"a": 1}', '{"a": 2}'),
            ("response_format", '{"type": "text"}', '{"type": "json_object"}'),
            ("presence_penalty", "0.1", "0.2"),
            ("prompt_cache_key", '"a"', '"b"'),
            ("extra_headers", '{"anthropic-beta": "a"}', '{"anthropic-beta": "b"}'),
            ("api_version", '"1"', '"2"'),
            ("provider", "dspy.Provider()", "dspy.clients.openai.OpenAIProvider()"),
        ]
    ),
    *(
        of_lm(f"{name} of an LM, which changes no answer", f"{name}=@@", '"a"', '"b"', NONE)
        for name in ("api_base", "base_url", "api_token", "azure_ad_token", "aws_secret_access_key", "aws_session_token")
    ),
    of_lm("a header that lets an LM in", 'extra_headers={"Authorization": "@@"}', "a", "b", NONE),
    of_lm("the order of an LM's arguments", "@@", "top_p=0.1, seed=1", "seed=1, top_p=0.1", NONE),
    of_lm("the order of an LM's nested arguments", "extra_body={@@}", '"a": 1, "b": 2', '"b": 2, "a": 1', NONE),
    Pair(
        "an LM class of the user's",
        "None",
        "1",
        head=HEAD.replace(
            "LM = dspy.LM(",
            "\nclass Own(dspy.LM):\n    def forward(self, *args, **kwargs):\n        return @@\n\n\nLM = Own(",
        ),
    ),
    Pair(
        "an engine of the user's",
        "1",
        "2",
        head=HEAD.replace('api_key="none"', "engine=Engine(@@)").replace(
            "\nLM =",
            """

class Engine:
    def __init__(self, n):
        self.n = n

    def complete(self, request):
        return self.n


LM =""",
        ),
    ),
]

SETTINGS = [
    *(
        of_settings(
            f"the adapter: {name}",
            f"adapter={adapter}",
            a,
            b,
            before="\nfrom dspy.adapters.baml_adapter import BAMLAdapter\n",
        )
        for name, adapter, a, b in [
            ("Chat or JSON", "dspy.@@()", "ChatAdapter", "JSONAdapter"),
            ("JSON or BAML", "@@()", "dspy.JSONAdapter", "BAMLAdapter"),
            ("native function calling", "dspy.ChatAdapter(use_native_function_calling=@@)", "True", "False"),
            ("the fallback to JSON", "dspy.ChatAdapter(use_json_adapter_fallback=@@)", "True", "False"),
            ("parallel tool calls", "dspy.JSONAdapter(parallel_tool_calls=@@)", "True", "False"),
            ("native response types", "dspy.ChatAdapter(native_response_types=[@@])", "", "dspy.Reasoning"),
            ("the model that extracts", 'dspy.TwoStepAdapter(dspy.LM("openai/@@"))', "a", "b"),
            ("tokens of the model that extracts", 'dspy.TwoStepAdapter(dspy.LM("openai/a", max_tokens=@@))', "1", "2"),
            ("the key of the model that extracts", 'dspy.TwoStepAdapter(dspy.LM("openai/a", api_key="@@"))', "1", "1"),
        ]
        if a != b
    ),
    of_settings(
        "an adapter of the user's",
        "adapter=Own()",
        "1",
        "2",
        before="""

class Own(dspy.ChatAdapter):
    def format_field_structure(self, signature):
        return "@@"
""",
    ),
    of_settings("the LM that a judge asks", 'lm=dspy.LM("openai/@@")', "a", "b"),
    of_settings("the key of the LM that a judge asks", 'lm=dspy.LM("openai/a", api_key="@@")', "a", "b", NONE),
    of_settings("the retriever", "rm=dspy.Retrieve(k=@@)", "1", "2"),
    of_settings("a setting of the user's", "depth=@@", "1", "2"),
    of_settings("the interpreter", "interpreter_factory=lambda: @@", "1", "2"),
    of_settings("errors that end an evaluation", "max_errors=@@", "5", "6"),
    of_settings("the threads", "num_threads=@@", "5", "6", NONE),
    of_settings("tracking of usage", "track_usage=@@", "True", "False", NONE),
]

PROPOSE = """

def propose(candidate, reflective_dataset, components_to_update):
    return {name: "@@" for name in components_to_update}
"""
GEPA = "dspy.GEPA(metric=metric, reflection_lm=LM, max_metric_calls=9, {})"
OPTIMIZERS = [
    *(
        of_p(f"{name} of BootstrapFewShot", f"dspy.BootstrapFewShot(metric=metric, {name}=@@)", a, b)
        for name, a, b in [
            ("max_bootstrapped_demos", "1", "2"),
            ("max_labeled_demos", "1", "2"),
            ("max_rounds", "1", "2"),
            ("metric_threshold", "0.5", "0.6"),
            ("max_errors", "1", "2"),
            ("teacher_settings", '{"lm": dspy.LM("openai/a")}', '{"lm": dspy.LM("openai/b")}'),
            ("teacher_settings", '{"lm": dspy.LM("openai/a", max_tokens=1)}', '{"lm": dspy.LM("openai/a", max_tokens=2)}'),
        ]
    ),
    *(
        of_p(f"{name} of the random search", P_DEFAULT.replace("programs=2", f"programs=2, {name}=@@"), a, b)
        for name, a, b in [
            ("stop_at_score", "50", "60"),
            ("max_labeled_demos", "3", "4"),
            ("metric_threshold", "0.1", "0.2"),
        ]
    ),
    of_p("the candidates of the random search", P_DEFAULT.replace("=2", "=@@"), "2", "3"),
    of_p("the threads of the random search", P_DEFAULT.replace("programs=2", "programs=2, num_threads=@@"), "1", "2", NONE),
    of_p("the threads of GEPA", GEPA.format("num_threads=@@"), "1", "2", NONE),
    of_p("the k of LabeledFewShot", "dspy.LabeledFewShot(k=@@)", "2", "3"),
    *(
        of_p(f"{name} of COPRO", f"dspy.COPRO(metric=metric, {name}=@@)", a, b)
        for name, a, b in [
            ("breadth", "2", "3"),
            ("depth", "2", "3"),
            ("init_temperature", "1.1", "1.2"),
            ("prompt_model", 'dspy.LM("openai/a", max_tokens=5)', 'dspy.LM("openai/a", max_tokens=6)'),
        ]
    ),
    *(
        of_p(f"{name} of MIPROv2", f"dspy.MIPROv2(metric=metric, auto=None, num_candidates=3, {name}=@@)", a, b)
        for name, a, b in [
            ("max_bootstrapped_demos", "2", "3"),
            ("init_temperature", "0.5", "0.6"),
            ("seed", "1", "2"),
            ("prompt_model", 'dspy.LM("openai/a")', 'dspy.LM("openai/b")'),
            ("task_model", 'dspy.LM("openai/a")', 'dspy.LM("openai/b")'),
        ]
    ),
    of_p("how much MIPROv2 does", "dspy.MIPROv2(metric=metric, auto=@@)", '"light"', '"heavy"'),
    *(
        of_p(f"{name} of GEPA", GEPA.format(f"{name}=@@"), a, b)
        for name, a, b in [
            ("reflection_minibatch_size", "2", "3"),
            ("candidate_selection_strategy", '"pareto"', '"current_best"'),
            ("skip_perfect_score", "True", "False"),
            ("add_format_failure_as_feedback", "True", "False"),
            ("component_selector", '"round_robin"', '"all"'),
            ("use_merge", "True", "False"),
            ("seed", "1", "2"),
            ("failure_score", "0.0", "0.1"),
            ("gepa_kwargs", '{"use_cloudpickle": True}', '{"use_cloudpickle": False}'),
        ]
    ),
    of_p("the budget of GEPA", GEPA.format("").replace("=9", "=@@"), "8", "9"),
    of_p("the reflection LM of GEPA", GEPA.format("").replace("=LM", '=dspy.LM("openai/r", max_tokens=@@)'), "8", "9"),
    of_p("the proposer of GEPA", GEPA.format("instruction_proposer=propose"), "a", "b", before=PROPOSE),
    of_p("the folder of GEPA", GEPA.format('log_dir=str(ctx.scratch_dir) + "@@"'), "", "", NONE),
    *(
        of_p(f"{name} of SIMBA", f"dspy.SIMBA(metric=metric, {name}=@@)", a, b)
        for name, a, b in [
            ("bsize", "2", "3"),
            ("num_candidates", "2", "3"),
            ("max_steps", "2", "3"),
            ("max_demos", "2", "3"),
            ("prompt_model", 'dspy.LM("openai/a")', 'dspy.LM("openai/b")'),
            ("temperature_for_sampling", "0.1", "0.2"),
            ("temperature_for_candidates", "0.1", "0.2"),
        ]
    ),
    of_p("the rules of InferRules", "dspy.InferRules(metric=metric, num_rules=@@)", "2", "3"),
    of_p(
        "the k of KNNFewShot",
        "dspy.KNNFewShot(k=@@, trainset=examples(), vectorizer=dspy.Embedder(embed))",
        "1",
        "2",
        before=EMBED.replace("@@", "%"),
    ),
    of_p(
        "the vectorizer of KNNFewShot",
        "dspy.KNNFewShot(k=1, trainset=examples(), vectorizer=dspy.Embedder(embed))",
        "%",
        "//",
        before=EMBED,
    ),
    of_p("the size of an ensemble", "dspy.Ensemble(reduce_fn=dspy.majority, size=@@)", "1", "2"),
    of_p(
        "an optimizer of the user's",
        "Own()",
        "1",
        "2",
        before="""

class Own(dspy.teleprompt.Teleprompter):
    def compile(self, student, *, trainset):
        return dspy.LabeledFewShot(k=@@).compile(student, trainset=trainset)
""",
    ),
    *(
        of_w(f"{name} of BootstrapFinetune", f"{name}=@@", a, b)
        for name, a, b in [
            ("multitask", "True", "False"),
            ("exclude_demos", "True", "False"),
            ("adapter", "dspy.ChatAdapter()", "dspy.XMLAdapter()"),
            ("adapter", "{LM: dspy.ChatAdapter()}", "{LM: dspy.XMLAdapter()}"),
            ("train_kwargs", '{LM: {"a": 1}}', '{LM: {"a": 2}}'),
            (
                "adapter",
                "dspy.ChatAdapter(use_json_adapter_fallback=True)",
                "dspy.ChatAdapter(use_json_adapter_fallback=False)",
            ),
        ]
    ),
    of_w(
        "the order of train_kwargs", "train_kwargs={@@}", '"epochs": 1, "lora_rank": 2', '"lora_rank": 2, "epochs": 1', NONE
    ),
    of_w(
        "train_kwargs in a variable of another name",
        "train_kwargs=dict(@@)",
        "epochs=1, lora_rank=2",
        "lora_rank=2, epochs=1",
        NONE,
    ),
    Pair(
        "the metric of one optimizer",
        "True",
        "False",
        P,
        build="""

def stricter(example, prediction, trace=None):
    return prediction.answer == example.answer or @@
"""
        + BUILD.replace(P_DEFAULT, P_DEFAULT.replace("=metric", "=stricter")),
    ),
    Pair(
        "an optimizer that no strategy names",
        "1",
        "2",
        NONE,
        build=BUILD.replace("    return {\n", '    return {\n        "x": dspy.LabeledFewShot(k=@@),\n'),
    ),
    Pair(
        "the order of the optimizers",
        '"w": W, "p": P',
        '"p": P, "w": W',
        NONE,
        build=BUILD.replace(
            "    return {", "    P, W = " + P_DEFAULT + ", BootstrapFinetune(metric=metric)\n    return {@@}\n    return {"
        ),
    ),
    of_task("a compile argument", 'optimizer_compile_args={"p": {"trainset": examples()[:@@]}}', "5", "6", P),
    of_task(
        "a teacher",
        "teacher=teacher()",
        "a",
        "b",
        BOTH,
        before="""

def teacher():
    made = dspy.Predict("question -> answer")
    made.set_lm(dspy.LM("openai/@@"))
    return made
""",
    ),
    of_task("the version that a task gives itself", "version=@@", '"1"', '"2"', ALL),
    of_task("the testset", "testset=examples()[:@@]", "1", "2", NONE),
    of_task("the valset", "valset=examples()[:@@]", "4", "5", ALL),
    Pair(
        "a comment in a program that MIPROv2 shows a model",
        "one",
        "two",
        P,
        program=MODULE + "\n    # @@\n\n\ndef program():\n    return Program()\n",
        build=BUILD.replace(P_DEFAULT, 'dspy.MIPROv2(metric=metric, auto="light")'),
    ),
    Pair(
        "a comment in a program that SIMBA shows a model",
        "one",
        "two",
        P,
        program=MODULE + "\n    # @@\n\n\ndef program():\n    return Program()\n",
        build=BUILD.replace(P_DEFAULT, "dspy.SIMBA(metric=metric)"),
    ),
]

DATA = [
    of_examples("a value of an example", 'dspy.Example(question=f"q{n}", answer=str(n) + "@@")', "", "!"),
    of_examples("a further field", 'dspy.Example(question=f"q{n}", answer=str(n), @@)', "hint=1", "hint=2"),
    of_examples("the type of a value", "dspy.Example(question=@@, answer=str(n))", "n", "float(n)"),
    of_examples(
        "the order of an example's fields", "dspy.Example(@@)", "question='q', answer='a'", "answer='a', question='q'", NONE
    ),
    of_examples(
        "the order of a dict that is shown in prompts", "dspy.Example(question=dict(@@), answer='a')", "a=1, b=2", "b=2, a=1"
    ),
    of_examples("an image", 'dspy.Example(question=dspy.Image("data:image/png;base64,@@"), answer="a")', "AAAA", "BBBB"),
    of_examples("a history", 'dspy.Example(question=dspy.History(messages=[{"question": "@@"}]), answer="a")', "a", "b"),
    of_examples("the order of a set", "dspy.Example(question={@@}, answer='a')", "'a', 'b'", "'b', 'a'", NONE),
    Pair(
        "which fields are inputs",
        '"question"',
        '"question", "answer"',
        build=BUILD.replace('.with_inputs("question")', ".with_inputs(@@)"),
    ),
    Pair("the order of the examples", "20", "19, -1, -1", build=BUILD.replace("range(20)", "range(@@)")),
]

WORDS = {"words.txt": "@@\n"}
METRICS = [
    of_metric(
        "a docstring that nobody reads", '"""@@"""\n    return example.answer == prediction.answer', "One.", "Two.", NONE
    ),
    of_metric(
        "a docstring where there was none", "@@\n    return example.answer == prediction.answer", '"""One."""', "", NONE
    ),
    of_metric(
        "a docstring that is read",
        "return clean.__doc__ in prediction.answer",
        "One.",
        "Two.",
        before='\ndef clean():\n    """@@"""\n',
    ),
    of_metric(
        "formatting",
        "return (@@)",
        "example.answer ==\n\n        prediction.answer",
        "example.answer == prediction.answer",
        NONE,
    ),
    of_metric("a function that nothing reaches", "return True", "1", "2", NONE, before="\ndef other():\n    return @@\n"),
    of_metric("an operator", "return len(prediction.answer) @@ 3", "<", "<="),
    of_metric("a constant", "return len(prediction.answer) < @@", "3", "4"),
    of_metric("a constant's type", "return @@", "1", "True"),
    of_metric("an attribute", "return prediction.@@ == example.answer", "answer", "reply"),
    of_metric("a local function", "f = lambda text: text.@@()\n    return f(example.answer)", "lower", "upper"),
    of_metric("a comprehension", "return sum(c @@ 'a' for c in prediction.answer)", "==", "!="),
    of_metric("a default argument", "return score()", "1", "2", before="\ndef score(most=@@):\n    return most\n"),
    of_metric("a keyword's default", "return score()", "1", "2", before="\ndef score(*, most=@@):\n    return most\n"),
    of_metric("what is caught", "try:\n        return 1\n    except @@:\n        return 0", "KeyError", "ValueError"),
    of_metric("a global constant", "return LIMIT", "1", "2", before="\nLIMIT = @@\n"),
    of_metric("a value in a global dict", "return TABLE['a']", "1", "2", before="\nTABLE = {'a': @@}\n"),
    of_metric(
        "the order of a global dict that may be walked",
        "return [*TABLE]",
        "'a': 1, 'b': 2",
        "'b': 2, 'a': 1",
        before="\nTABLE = {@@}\n",
    ),
    of_metric(
        "a global that is loaded from JSON",
        "return TABLE['a']",
        "1",
        "2",
        before="\nimport json\nTABLE = json.loads('{\"a\": @@}')\n",
    ),
    of_metric("an attribute of an object", "return O.n", "1", "2", before="\nclass C:\n    pass\nO = C()\nO.n = @@\n"),
    of_metric(
        "a slot of an object", "return O.n", "1", "2", before="\nclass C:\n    __slots__ = ('n',)\nO = C()\nO.n = @@\n"
    ),
    of_metric(
        "the content of a list of a class of its own",
        "return L[0]",
        "1",
        "2",
        before="\nclass L(list):\n    pass\nL = L([@@])\n",
    ),
    of_metric(
        "a text of a class of its own", "return T == 'a'", "a", "b", before="\nclass Text(str):\n    pass\nT = Text('@@')\n"
    ),
    of_metric("a regular expression", "return bool(R.search('a'))", "a", "b", before="\nimport re\nR = re.compile('@@')\n"),
    of_metric(
        "the flags of a regular expression",
        "return bool(R.search('a'))",
        "0",
        "re.I",
        before="\nimport re\nR = re.compile('a', @@)\n",
    ),
    of_metric(
        "a bound method of a regular expression",
        "return bool(find('a'))",
        "a",
        "b",
        before="\nimport re\nfind = re.compile('@@').search\n",
    ),
    of_metric("a bound method of a text", "return has('a')", "a", "b", before="\nhas = '@@'.__contains__\n"),
    of_metric(
        "a bound method of an object",
        "return f('a')",
        "1",
        "2",
        before="\nclass C:\n    n = @@\n    def f(self, text):\n        return self.n\nf = C().f\n",
    ),
    of_metric("another function of Python", "return f([1])", "min", "max", before="\nf = @@\n"),
    of_metric("another method of a class of Python", "return f('a')", "lower", "upper", before="\nf = str.@@\n"),
    of_metric("a getter", "return get((1, 2))", "0", "1", before="\nimport operator\nget = operator.itemgetter(@@)\n"),
    of_metric("a partial function", "return f()", "1", "2", before="\nimport functools\nf = functools.partial(int, @@)\n"),
    of_metric(
        "a cached function",
        "return f()",
        "1",
        "2",
        before="\nimport functools\n@functools.lru_cache\ndef f():\n    return @@\n",
    ),
    of_metric(
        "a case of a function for several types",
        "return f(1)",
        "1",
        "2",
        before="""
import functools
@functools.singledispatch
def f(value):
    return 0
@f.register
def _(value: int):
    return @@
""",
    ),
    of_metric(
        "a wrapper that hides what it wraps",
        "return f()",
        "1",
        "2",
        before="""
import functools
def decorate(function):
    @functools.wraps(function)
    def other():
        return @@
    return other
@decorate
def f():
    return 5
""",
    ),
    of_metric(
        "a decorator that is an object",
        "return f()",
        "1",
        "2",
        before="""
class Times:
    def __init__(self, n):
        self.n = n
    def __call__(self, function):
        return lambda: function() * self.n
@Times(@@)
def f():
    return 5
""",
    ),
    of_metric("a closure", "return f()", "1", "2", before="\ndef make(n):\n    return lambda: n\nf = make(@@)\n"),
    of_metric("an attribute of a function", "return f.n", "1", "2", before="\ndef f():\n    pass\nf.n = @@\n"),
    of_metric(
        "a default factory",
        "return D['a']",
        "1",
        "2",
        before="\nimport collections\nD = collections.defaultdict(lambda: @@)\n",
    ),
    of_metric(
        "a named tuple", "return N.a", "1", "2", before="\nimport collections\nN = collections.namedtuple('N', 'a')(@@)\n"
    ),
    of_metric(
        "a dataclass's default factory",
        "return C().a",
        "1",
        "2",
        before="""
import dataclasses
@dataclasses.dataclass
class C:
    a: list = dataclasses.field(default_factory=lambda: [@@])
""",
    ),
    of_metric(
        "a member of an enum", "return K.A.value", "1", "2", before="\nimport enum\nclass K(enum.Enum):\n    A = @@\n"
    ),
    of_metric("a decimal", "return D", "1.0", "1.1", before="\nfrom decimal import Decimal\nD = Decimal('@@')\n"),
    of_metric("a date", "return D", "1", "2", before="\nimport datetime\nD = datetime.date(2020, 1, @@)\n"),
    of_metric(
        "the state of a random generator", "return R.random()", "1", "2", before="\nimport random\nR = random.Random(@@)\n"
    ),
    of_metric(
        "the state of numpy's generator",
        "return R.random()",
        "1",
        "2",
        before="\nimport numpy as np\nR = np.random.default_rng(@@)\n",
    ),
    of_metric(
        "the state of numpy's old generator",
        "return R.rand()",
        "1",
        "2",
        before="\nimport numpy as np\nR = np.random.RandomState(@@)\n",
    ),
    of_metric(
        "the middle of a large array",
        "return A[5000]",
        "1",
        "2",
        before="\nimport numpy as np\nA = np.zeros(10000)\nA[5000] = @@\n",
    ),
    of_metric(
        "the type of an array",
        "return A[0]",
        "int32",
        "int64",
        before="\nimport numpy as np\nA = np.zeros(4, dtype=np.@@)\n",
    ),
    of_metric("the shape of an array", "return A[0]", "2, 3", "3, 2", before="\nimport numpy as np\nA = np.zeros((@@))\n"),
    of_metric(
        "an array of objects",
        "return A[0]",
        "1",
        "2",
        before="\nimport numpy as np\nA = np.array([{'a': @@}], dtype=object)\n",
    ),
    of_metric(
        "a column's name", "return T.shape", "a", "b", before="\nimport pandas as pd\nT = pd.DataFrame({'@@': [1]})\n"
    ),
    of_metric(
        "the index of a table",
        "return T.shape",
        "1",
        "2",
        before="\nimport pandas as pd\nT = pd.DataFrame({'a': [1]}, index=[@@])\n",
    ),
    of_metric("a column of its own", "return S.sum()", "1", "2", before="\nimport pandas as pd\nS = pd.Series([0, @@])\n"),
    of_metric(
        "a category",
        "return S.iloc[0]",
        "a",
        "b",
        before="\nimport pandas as pd\nS = pd.Series(['@@', 'c'], dtype='category')\n",
    ),
    of_metric("a template", "return T.render(a=1)", "a", "b", before="\nimport jinja2\nT = jinja2.Template('{{ @@ }}')\n"),
    Pair(
        "a metric that is a coroutine function",
        "==",
        "!=",
        metric="\nasync def metric(example, prediction, trace=None):\n    return example.answer @@ prediction.answer\n",
    ),
    Pair(
        "a metric that is an object",
        "1",
        "2",
        metric="""
class Metric:
    def __init__(self, n):
        self.n = n
    def __call__(self, example, prediction, trace=None):
        return self.n
metric = Metric(@@)
""",
    ),
    Pair("a metric that is a program", "0.5", "0.6", metric="\nmetric = dspy.evaluate.SemanticF1(threshold=@@)\n"),
    of_metric(
        "a module of a package",
        "return tools.text.clean(example.answer)",
        "lower",
        "upper",
        before="\nimport tools.text\n",
        files={"tools/__init__.py": "", "tools/text.py": "def clean(text):\n    return text.@@()\n"},
    ),
    of_metric(
        "another function of a module of a package",
        "return tools.text.clean(example.answer)",
        "lower",
        "upper",
        NONE,
        before="\nimport tools.text\n",
        files={
            "tools/__init__.py": "",
            "tools/text.py": "def clean(text):\n    return text\n\n\ndef other(text):\n    return text.@@()\n",
        },
    ),
    of_metric(
        "a package without a file",
        "return tools.text.clean(example.answer)",
        "lower",
        "upper",
        before="\nimport tools.text\n",
        files={"tools/text.py": "def clean(text):\n    return text.@@()\n"},
    ),
    of_metric(
        "a module imported in a function",
        "import tools.text as t\n    return t.clean(example.answer)",
        "lower",
        "upper",
        files={"tools/__init__.py": "", "tools/text.py": "def clean(text):\n    return text.@@()\n"},
    ),
    of_metric(
        "what a module imported in a function imports",
        "from a import f\n    return f()",
        "1",
        "2",
        files={"a.py": "from b import g\n\n\ndef f():\n    return g()\n", "b.py": "def g():\n    return @@\n"},
    ),
    of_metric(
        "a module that its package gives",
        "from tools import text\n    return text.f()",
        "1",
        "2",
        files={"tools/__init__.py": "", "tools/text.py": "def f():\n    return @@\n"},
    ),
    of_metric(
        "a relative import in a function",
        "return f()",
        "1",
        "2",
        before="\nfrom tools.a import f\n",
        files={
            "tools/__init__.py": "",
            "tools/a.py": "def f():\n    from .b import g\n    return g()\n",
            "tools/b.py": "def g():\n    return @@\n",
        },
    ),
    of_metric(
        "a comment in a module imported in a function",
        "from a import f\n    return f()",
        "1",
        "2",
        NONE,
        files={"a.py": '"""Text."""\n# @@\n\n\ndef f():\n    """@@"""\n    return 1\n'},
    ),
    of_metric(
        "a module that is imported by a text",
        "import importlib\n    return importlib.import_module('a').f()",
        "1",
        "2",
        files={"a.py": "def f():\n    return @@\n"},
    ),
    of_metric(
        "a module that getattr reads",
        "return getattr(a, 'f')()",
        "1",
        "2",
        before="\nimport a\n",
        files={"a.py": "def f():\n    return @@\n"},
    ),
    of_metric("what eval may run", "return eval('hid' + 'den()')", "1", "2", before="\ndef hidden():\n    return @@\n"),
    of_metric("a file that is named in a function", "return open('words.txt').read()", "a", "b", files=WORDS),
    of_metric(
        "a file beside the code",
        "return WORDS.read_text()",
        "a",
        "b",
        before="\nfrom pathlib import Path\nWORDS = Path(__file__).with_name('words.txt')\n",
        files=WORDS,
    ),
    of_metric(
        "a file whose path is a text",
        "return open(WORDS).read()",
        "a",
        "b",
        before="\nimport os\nWORDS = os.path.join(os.path.dirname(__file__), 'words.txt')\n",
        files=WORDS,
    ),
    of_metric(
        "a folder, as a path",
        "return HERE.name",
        "",
        "",
        NONE,
        before="\nfrom pathlib import Path\nHERE = Path(__file__).parent\n",
    ),
    of_metric("a folder, as a text", "return HERE", "", "", NONE, before="\nimport os\nHERE = os.path.dirname(__file__)\n"),
    of_metric(
        "a log by the module's name",
        "LOG.info('a')\n    return True",
        "",
        "",
        NONE,
        before="\nimport logging\nLOG = logging.getLogger(__name__)\n",
    ),
    of_metric(
        "a lock", "return True if LOCK else False", "", "", NONE, before="\nimport threading\nLOCK = threading.Lock()\n"
    ),
    of_metric("a key of an API", "return bool(API_KEY)", "a", "b", NONE, before="\nAPI_KEY = '@@'\n"),
    of_metric("the order of a set", "return 'a' in S", "'a', 'b'", "'b', 'a'", NONE, before="\nS = {@@}\n"),
    of_metric(
        "a key of its own",
        "return O.n",
        "1",
        "2",
        before="""
class C:
    def __bt_ray_key__(self):
        return self.n
O = C()
O.n, O.at = @@, object()
""",
    ),
    of_metric(
        "what a key of its own leaves out",
        "return O.n",
        "1",
        "2",
        NONE,
        before="""
class C:
    __bt_ray_key__ = "v1"
O = C()
O.n = @@
""",
    ),
    of_metric(
        "a function with a key of its own",
        "return f()",
        "1",
        "2",
        NONE,
        before="\ndef f():\n    return @@\nf.__bt_ray_key__ = 'v1'\n",
    ),
]

HERE = "\nimport os\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"
IN_A_FOLDER = {"data/words.txt": "@@\n"}
ONE = {"a.py": "def f():\n    return @@\n"}
FILES = [
    *(
        of_metric(f"a file that is read: {name}", f"return {body}", "a", "b", before=HERE + before, files=IN_A_FOLDER)
        for name, body, before in [
            ("below a folder", "(HERE / 'data' / 'words.txt').read_text()", ""),
            ("below a folder that is joined", "open(os.path.join(HERE, 'data', 'words.txt')).read()", ""),
            ("its name is made", "(HERE / 'data' / f'{example.answer}.txt').read_text()", ""),
            ("its name is in a dict", "(HERE / 'data' / NAMES['a']).read_text()", "NAMES = {'a': 'words.txt'}\n"),
            ("all of a folder", "[p.read_text() for p in DATA.glob('*')]", "DATA = HERE / 'data'\n"),
            ("all that end so", "[p.read_text() for p in HERE.rglob('*.txt')]", ""),
            ("the path is of a class", "open(C.path).read()", "class C:\n    path = str(HERE / 'data' / 'words.txt')\n"),
            ("it is open", "F.read()", "F = open(HERE / 'data' / 'words.txt')\n"),
            ("the path is a default", "f()", "def f(path=HERE / 'data' / 'words.txt'):\n    return path.read_text()\n"),
            (
                "a template is loaded",
                "E.get_template('words.txt').render()",
                "import jinja2\nE = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE / 'data'))\n",
            ),
        ]
    ),
    of_metric(
        "a file without an ending", "return (HERE / 'words').read_text()", "a", "b", before=HERE, files={"words": "@@"}
    ),
    of_metric("a file in a folder that nothing names", "return True", "a", "b", NONE, before=HERE, files=IN_A_FOLDER),
    of_metric(
        "what a run directory in the task's folder has",
        "return [p.read_text() for p in HERE.glob('*.txt')]",
        "a",
        "b",
        NONE,
        before=HERE,
        files={"runs/one/sweep.json": "{}", "runs/one/log.txt": "@@"},
    ),
    *(
        of_metric(
            f"a module: {name}", f"return {body}", "1", "2", before=f"\nimport operator, sys\nimport a\n{before}", files=ONE
        )
        for name, body, before in [
            ("handed on", "call(a)", "def call(module):\n    return module.f()\n"),
            ("asked by a text", "operator.attrgetter('f')(a)()", ""),
            ("among those that are loaded", "sys.modules['a'].f()", ""),
        ]
    ),
    of_metric(
        "a module of a package that is handed on",
        "return call(t.a)",
        "1",
        "2",
        before="\nimport t.a\n\ndef call(module):\n    return module.f()\n",
        files={"t/__init__.py": "", "t/a.py": ONE["a.py"]},
    ),
    of_metric(
        "what a module gives that it has not",
        "return a.LIMIT",
        "1",
        "2",
        before="\nimport a\n",
        files={"a.py": "def __getattr__(name):\n    return @@\n"},
    ),
    of_metric(
        "all that a package says that it has",
        "import b\n    return b.g()",
        "1",
        "2",
        files={
            "b.py": "from tools import *\n\n\ndef g():\n    return a.f()\n",
            "tools/__init__.py": "__all__ = ['a']\n",
            "tools/a.py": ONE["a.py"],
        },
    ),
]
STATES = [
    *(
        of_metric(f"what is held: {name}", f"return {body}", "1", "2", before=f"\n{before}\n")
        for name, body, before in [
            ("a variable of the environment", "int(os.environ['A_LIMIT'])", "import os\nos.environ['A_LIMIT'] = '@@'"),
            ("one that getenv reads", "os.getenv('A_LIMIT', '0')", "import os\nos.environ['A_LIMIT'] = '@@'"),
            ("a patched function of Python", "string.capwords('a')", "import string\nstring.capwords = lambda text: @@"),
            ("a patched class", "networkx.Graph().size()", "import networkx\nnetworkx.Graph.size = lambda self: @@"),
            ("a generator", "next(G)", "G = (n for n in [@@, 3])"),
            ("items of a dict", "list(G)", "G = {'a': @@}.items()"),
            (
                "a database",
                "C.execute('select 1')",
                "import sqlite3\nC = sqlite3.connect(':memory:')\nC.execute('select @@')",
            ),
            ("a format of bytes", "S.size", "import struct\nS = struct.Struct('@@i')"),
            ("a match", "X.group()", "import re\nX = re.match('.', '@@')"),
            ("a hash", "H.hexdigest()", "import hashlib\nH = hashlib.md5(b'@@')"),
            ("a variable of a context", "V.get()", "import contextvars\nV = contextvars.ContextVar('v', default=@@)"),
            (
                "a class of new_class",
                "C.n",
                "import types\nC = types.new_class('C', (), {}, lambda names: names.update(n=@@))",
            ),
            (
                "a class of make_dataclass",
                "C().n",
                "import dataclasses\nC = dataclasses.make_dataclass('C', [('n', int, @@)])",
            ),
            ("a mask of an array", "A.sum()", "import numpy as np\nA = np.ma.array([1, 2], mask=[@@ == 1, False])"),
            ("attributes of a table", "T.attrs", "import pandas as pd\nT = pd.DataFrame({'a': [1]})\nT.attrs['x'] = @@"),
        ]
    ),
    *(
        of_metric(f"the random state of this process: {name}", "return f()", "", "", NONE, before=f"\n{before}\nf()\n")
        for name, before in [
            ("Python's", "from random import random as f"),
            ("numpy's", "from numpy.random import rand as f"),
        ]
    ),
    of_program(
        "a type that a signature names in a text",
        "Program()",
        "its name",
        "the name",
        before="\nimport pydantic, typing\n"
        + ITEM.replace("its name", "@@")
        + MODULE.replace("return self", 'dspy.Predict("question -> answer: Item")\n        return self'),
    ),
    of_program(
        "the docstring of a tool that is an object",
        "Program()",
        "Count.",
        "Measure.",
        before='\n\nclass Tool:\n    """@@"""\n\n    def __call__(self, name: str) -> int:\n        return 1\n'
        + MODULE.replace("return self", 'dspy.ReAct("a -> b", tools=[Tool()])\n        return self'),
    ),
]

PAIRS = [*MODULES, *FIELDS, *LMS, *SETTINGS, *OPTIMIZERS, *DATA, *METRICS, *FILES, *STATES]
