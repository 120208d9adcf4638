"""Gradients that leave memory before the step, and which of them a backward pass reaches. Knows no optimizers."""
