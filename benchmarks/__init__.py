"""Benchmarks of the operator and of the network; README.md beside this file."""
