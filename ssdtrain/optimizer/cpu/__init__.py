"""Updates on the CPU, by a thread beside training. Knows optimizers, state and gradients; not when a step is due."""
