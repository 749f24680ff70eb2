"""The driver: checks a sweep, connects to Ray, runs the trials through Ray Tune, ranks what they found."""
