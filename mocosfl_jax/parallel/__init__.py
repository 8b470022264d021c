"""A step over many devices: the mesh, the state at rest on it, and what the devices exchange."""
