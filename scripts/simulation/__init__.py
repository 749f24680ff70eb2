"""What `simulate.py` and `bench_sweep.py` stand on: a simulated sweep, and schedules that none can beat."""
