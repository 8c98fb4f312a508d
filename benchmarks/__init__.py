"""Measurements to read, never tests to pass: `python -m benchmarks.reserve`."""
