"""Measurements: what a step costs, beside baselines measured in the same run."""
