"""What a run would need on an accelerator that is not here: memory, time and traffic, from its compiler."""
