"""Names of what lets someone in, or says where a service is: it changes no answer, and is no part of a key."""

import re
from typing import Any

SECRETS = re.compile(
    r"_*(\w+_)?(api_key|apikey|api_token|access_token|auth_token|bearer_token|client_secret|secret_key|secret_access_key)"
)
OF_CLIENTS = re.compile(
    r"_*(\w+_)?(api_base|api_host|authorization|azure_endpoint|base_url|client_id|cookie|credentials?|endpoint|host|hostname|"
    r"password|secret|access_key|access_key_id|(ad|session|hf|hub|id|refresh|security|databricks)_token|token_provider)"
    r"|_*(token|key|url|uri)"
)


def is_secret(name: Any, value: Any) -> bool:
    """Whether a variable or an attribute of the user's, by its name, is a secret."""
    return isinstance(value, str) and isinstance(name, str) and SECRETS.fullmatch(_plain(name)) is not None


def is_of_a_client(name: Any) -> bool:
    """Whether a setting of a client of a service, by its name, is a secret or an address."""
    return isinstance(name, str) and any(pattern.fullmatch(_plain(name)) for pattern in (SECRETS, OF_CLIENTS))


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
