"""What this machine has of models of the hub, as `huggingface_hub` keeps it: here the commits of revisions alone."""

import os
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_ref(model: str, revision: str = "main", commit: str = COMMIT) -> None:
    """Have the copy of a model know what commit a revision stood for when it was made."""
    ref = Path(os.environ["HF_HUB_CACHE"], f"models--{model.replace('/', '--')}", "refs", revision)
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
