"""Operators for compiled graphs that have what they save travel, and reload it where it is needed.

Knows what compiled graphs save in an offload context; neither drives nor when bytes move.
"""
