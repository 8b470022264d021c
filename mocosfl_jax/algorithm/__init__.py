"""MocoSFL and FL-MoCo as pure functions: the two sides of the cut, the queue, averaging and schedules."""
