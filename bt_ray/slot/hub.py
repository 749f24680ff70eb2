"""Commits of the Hugging Face hub: what a name and a branch stand for now."""

import re
from functools import cache
from pathlib import Path

from bt_ray.errors import ConfigError

COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT = "main"
ANSWER_S = 20.0
"""Seconds that the hub has to answer."""


@cache
def find_commit(model: str, revision: str | None = None) -> str:
    """The commit that a model's revision stands for: the hub's, or, where it is not reached, that of the local copy.

    Args:
        model: A model id of the hub.
        revision: A branch, a tag or a commit; default: `main`.

    Raises:
        ConfigError: The hub has no such model or revision, or it cannot be reached and there is no local copy.
    """
    revision = revision or DEFAULT
    if COMMIT.fullmatch(revision):
        return revision
    try:
        return _ask_hub(model, revision)
    except (OSError, RuntimeError) as error:  # httpx's errors, and what the library says when it is told to stay offline
        if (commit := _read_local(model, revision)) is not None:
            return commit
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model: the commit of {model}, revision {revision}, is not known: the hub cannot be reached ({why}), and this "
            "machine has no copy. Without it, answers of two versions could be taken for those of one. Name the commit, "
            'server.revision = "<40 hex digits>", or give a folder.'
        ) from None


def _ask_hub(model: str, revision: str) -> str:
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit: str | None = HfApi().model_info(model, revision=revision, timeout=ANSWER_S).sha
    except GatedRepoError as error:
        raise ConfigError(f"model: {model} is gated: the hub wants a token that has access to it (HF_TOKEN).") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"model: the hub has no revision {revision} of {model}.") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model: {model} is no folder here, and the hub has no such model, or wants a token for it (HF_TOKEN)."
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"model: {model} is no folder here, and no model id of the hub: {error}") from error
    except HTTPError as error:
        raise OSError(str(error)) from error
    if commit is None:
        raise OSError("the hub names no commit")
    return commit


def _read_local(model: str, revision: str) -> str | None:
    """The commit that the revision stood for when it was downloaded to this machine; None if it was not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        found = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}", "refs", revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return found if COMMIT.fullmatch(found) else None
