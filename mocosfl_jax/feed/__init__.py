"""From the data set to a training step: the images of each client, the images of each step, their views."""
