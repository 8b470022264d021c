"""A page about one run or several: what it says, and its HTML."""
