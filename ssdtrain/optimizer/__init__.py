"""Optimizer state and gradients on the drive, and updates on the CPU: a few parameters at a time. Knows no modules."""
