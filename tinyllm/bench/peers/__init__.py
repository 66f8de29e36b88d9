"""The work of the benchmarks done by other packages, as their users do it. Each file is run in a process of its own by ../runner.py."""
