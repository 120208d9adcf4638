"""Paths and directories as users pass them, files that are replaced or have no name. Knows no engine."""
