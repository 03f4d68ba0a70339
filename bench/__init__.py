"""Benchmarks: each compares with a peer or a baseline in the same run and prints the ratio. `make bench [NAME=...]`."""
