"""Measuring decode steps against what the machine can do: suites, ceilings, timing, peers, report."""
