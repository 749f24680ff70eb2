"""What a step depends on, as hashes: equal inputs give equal ones in any process on any machine, any change another.

Whatever can change a prompt, an answer, a score, the training data or the weights changes the key of the step that it
first concerns, and of all after it; what cannot, as a comment or a folder, changes none. `values` and `types` say what an
object is made of, `functions` and `code` what code is and mentions; `graph` makes hashes of that, each object once; `keys`
makes those of steps.
"""

from bt_ray.task.fingerprint.keys import digest, find_differences, find_places, step_keys, versions
from bt_ray.task.fingerprint.secrets import is_of_a_client
from bt_ray.task.fingerprint.values import OWN_KEY, is_users_object

__all__ = [
    "OWN_KEY",
    "digest",
    "find_differences",
    "find_places",
    "is_of_a_client",
    "is_users_object",
    "step_keys",
    "versions",
]
