"""Helpers shared by several tests: the toy network, the small run, comparisons."""
