"""Saved activations: the context, autograd's hooks, write-back and reload. Knows neither parameters nor optimizers."""
