"""What several tests need: the toy network, the small run, comparisons."""
