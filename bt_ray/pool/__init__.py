"""The pool of model servers: Ray actors, and the policy that decides which server serves whom."""
