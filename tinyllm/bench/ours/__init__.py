"""The work of the benchmarks done by tinyllm, as users do it. Each file is run in a process of its own by ../runner.py."""
