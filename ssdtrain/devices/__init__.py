"""Streams, events and memory of each kind of device. Knows neither records nor files."""
