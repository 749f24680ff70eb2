"""One vLLM process: its command line, its start and stop, and the guard in front of its routes.

`server` is the owner's side; `vllm_main` and `guard` run in the child.
"""
