"""Run by hand, from the top folder, as in `python -m experiments.benchmark`; nothing imports these."""
