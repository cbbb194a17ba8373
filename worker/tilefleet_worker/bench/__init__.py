"""Measures the engine under load: throughput, latencies, memory, and what a token costs."""
