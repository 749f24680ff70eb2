"""One fine-tune: the job that a slot hands to its training process, and the process itself.

`job` is the owner's side and imports nothing heavy; `main` and `trainer` run in the child, alone with torch and trl.
"""
