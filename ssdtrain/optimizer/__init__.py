"""Optimizer state on the drive, paged through the step a few parameters at a time. Knows no modules."""
