"""A trial: BetterTogether on one strategy, its models behind DSPy's LMs, its steps on the store."""
