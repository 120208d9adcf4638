"""Saved activations: the context, the hooks that autograd calls, and where each saved storage is meanwhile."""
