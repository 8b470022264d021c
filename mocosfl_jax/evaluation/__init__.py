"""Quality of features: kNN and classifiers on frozen features."""
