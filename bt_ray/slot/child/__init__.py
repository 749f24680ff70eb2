"""A child process that cannot outlive its owner, and whose death explains itself.

vLLM and training run as such children. `keeper` is the small process between the two; this is the owner's side.
"""

from bt_ray.slot.child.process import ChildProcess, child_environment, open_port

__all__ = ["ChildProcess", "child_environment", "open_port"]
