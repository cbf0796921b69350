"""Benchmarks and their metrics, each under the name of the variant that computed it."""
