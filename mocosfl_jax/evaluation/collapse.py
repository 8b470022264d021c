"""Collapse: the network maps all images to almost the same features.

The loss alone shows it late. It nears ln(K + 1) in each direction, its value for equal features, only once
the keys in the queue have become equal too.
"""

import numpy as np

# Spread of the projections below which they count as collapsed. It is 0.9 after an epoch of the quickstart. A
# learning rate a hundred times too large brings a narrow ResNet-18 to 1e-8 in the first epoch.
COLLAPSED = 1e-3


def spread(features: np.ndarray) -> float:
    """How much the directions of features differ: 1 - |mean of the unit rows|^2, from 0 to 1.

    This is the sum of the variances of their dimensions. It is 0 if all rows point in the same direction.

    Args:
      features: [n, D].

    Example:
      >>> spread(np.array([[1.0, 0.0], [3.0, 0.0]])), spread(np.array([[2.0, 0.0], [0.0, 1.0]]))
      (0.0, 0.5)
    """
    rows = np.asarray(features, np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    mean = rows.mean(axis=0)
    return float(np.mean(np.sum(np.square(rows - mean), axis=1)))
