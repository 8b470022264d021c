"""From the data set to a step: which client holds which images, the images of each step, and their views."""
