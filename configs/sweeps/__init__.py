"""Sweeps, to be run by `python -m experiments.sweep --config=configs/sweeps/<name>.py`."""
