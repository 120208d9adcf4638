"""Offloading in other people's training loops. Thin: each module only translates one framework."""
