"""Calibration: text to tokens, and statistics of what flows into linears."""
