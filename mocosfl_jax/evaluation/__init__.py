"""How good features are: kNN and classifiers on frozen features."""
