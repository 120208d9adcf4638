"""Commands for people: command line, doctor, drive benchmark, estimates, demo. Knows public names and engines."""
