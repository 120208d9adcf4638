"""Optimizer state on the drive, in memory for a few parameters at a time during the step. Knows no modules."""
