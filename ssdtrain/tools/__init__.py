"""Commands for people: the command line, the doctor, benchmarks of the drive, estimates, the demo."""
