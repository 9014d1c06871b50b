"""Benchmarks: each file is a program that says in its first lines what it measures."""
