"""Pictures of a run, as PNG files: its partition, its curves, and what its features have learned."""
