"""A sweep's settings: what they may be, how they are read from a file, and the variants of a space."""
