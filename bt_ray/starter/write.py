"""A starting task that runs, in a folder of the user's: what `bt-ray init` writes."""

import itertools
import json
import random
import shutil
from importlib.resources import as_file, files
from pathlib import Path

from bt_ray.errors import ConfigError

FILES = {"task.py.txt": "task.py", "sweep.toml": "sweep.toml"}
"""The files beside this one, and what they are called in the user's folder."""
EXAMPLES = "examples.jsonl"
THINGS = ("battery", "screen", "keyboard", "camera", "speaker", "manual", "packaging", "support")
SAID = {
    "positive": ("is a joy to use", "works better than I hoped", "is worth every cent", "never lets me down"),
    "negative": ("broke after a week", "is a waste of money", "does not work at all", "let me down badly"),
}


def write_starter(folder: Path) -> list[Path]:
    """Write a task, its examples and a sweep's settings into `folder`.

    Raises:
        ConfigError: One of the files is there already. Nothing is written then.
    """
    targets = [folder / name for name in (*FILES.values(), EXAMPLES)]
    if there := [target for target in targets if target.exists()]:
        raise ConfigError(f"{there[0]} is there already. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("bt_ray.starter")) as template:
        for name, target in FILES.items():
            shutil.copyfile(template / name, folder / target)
    (folder / EXAMPLES).write_text("".join(json.dumps(example) + "\n" for example in _examples()))
    return targets


def _examples() -> list[dict[str, str]]:
    """64 reviews in a fixed random order."""
    made = [
        {"review": f"The {thing} {said}.", "answer": label}
        for (label, sayings), thing in itertools.product(SAID.items(), THINGS)
        for said in sayings
    ]
    random.Random(0).shuffle(made)  # noqa: S311 - an order, no secret
    return made
