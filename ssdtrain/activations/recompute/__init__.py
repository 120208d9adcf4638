"""Blocks that run a second time in backward instead of having what they save kept. Knows modules; moves no bytes."""
