"""Which saved tensors stay, what is reloaded next, when to plan anew, on all ranks alike. Knows records, moves none."""
