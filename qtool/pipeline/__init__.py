"""Orchestration: the run, the blockwise driver, training, resume."""
