"""What a scripted model says, so that the outcome of every optimizer is known in advance.

A question "number 7" has the answer "14". The model answers it right if `7 % 10 < skill + demos + 2 * hints`, else "wrong".
Demos are those in the prompt, 3 at most; hints are the `HINTS` in its instruction.

Where `ReAct` asks for the next tool, it is `double`, once. Whatever else it is asked comes from an optimizer. It proposes
the task's instruction with one more hint than the prompt knows, wherever an instruction or advice is wanted, and has nothing
to say about anything else.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

HINTS = ("diligently", "unerringly", "tersely")
PER_HINT = 2


@dataclass(frozen=True)
class Said:
    """A completion, and what was in the prompt.

    Attributes:
        text: The completion.
        question: The number that was asked for; None if the prompt wanted a proposal.
        demos: The demos in the prompt, 3 at most.
        hints: How many hints its instruction has.
    """

    text: str
    question: str | None = None
    demos: int = 0
    hints: int = 0


def answer(skill: int, messages: list[dict[str, Any]]) -> Said:
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    fields = output_fields(system)
    if "next_tool_name" in fields:
        return Said(sections(next_tool(messages[-1]["content"])), questions(messages)[-1])
    if fields and "answer" not in fields:
        return Said(proposal(fields, messages[-1]["content"], as_json="Outputs will be a JSON object" in system))
    demos = min(3, sum(message["role"] == "assistant" for message in messages))
    hints = sum(hint in system for hint in HINTS)
    question = questions(messages)[-1]
    right = int(question) % 10 < skill + demos + PER_HINT * hints
    values = dict.fromkeys(fields, "Twice that.") | {"answer": str(2 * int(question)) if right else "wrong"}
    return Said(sections(values), question, demos, hints)


def questions(messages: list[dict[str, Any]]) -> list[str]:
    """The numbers in the last message."""
    return re.findall(r"number (\d+)", messages[-1]["content"])


def next_tool(prompt: str) -> dict[str, Any]:
    """`ReAct`'s next step: the tool `double`, and then the end."""
    number = re.findall(r"number (\d+)", prompt)[-1]
    if "observation_0" in prompt:
        return {"next_thought": "That is all.", "next_tool_name": "finish", "next_tool_args": {}}
    return {"next_thought": "It is to be doubled.", "next_tool_name": "double", "next_tool_args": {"value": int(number)}}


def completion(said: Said, *, cut_off: bool = False) -> dict[str, Any]:
    """The body of the answer that OpenAI's API would give, where it was cut off for want of tokens or not."""
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said.text},
                "finish_reason": "length" if cut_off else "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def instruction(hints: int) -> str:
    """The task's instruction, with so many hints."""
    return " ".join(["Double the number", *HINTS[:hints]]) + "."


def output_fields(system: str) -> dict[str, str]:
    """The output fields that a DSPy adapter's system message asks for, with their types."""
    _, _, described = system.partition("Your output fields are:")
    described, _, _ = described.partition("All interactions will be structured")
    return dict(re.findall(r"^\d+\. `(\w+)` \((.*?)\)", described, re.MULTILINE))


def proposal(fields: dict[str, str], prompt: str, *, as_json: bool) -> str:
    improved = instruction(min(len(HINTS), 1 + sum(hint in prompt for hint in HINTS)))
    values: dict[str, Any] = {}
    for name, kind in fields.items():
        if kind.startswith("dict"):
            values[name] = {"self": improved}  # the name of the only predictor
        else:
            values[name] = improved if "instruction" in name else "Numbers."
    return json.dumps(values) if as_json else sections(values)


def sections(values: dict[str, Any]) -> str:
    """As DSPy's ChatAdapter wants it."""
    said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return "".join(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in said.items()) + "[[ ## completed ## ]]"
