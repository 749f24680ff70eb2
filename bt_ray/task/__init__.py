"""The user's task: program, metric, examples and optimizers, and the keys of the steps that they make."""
