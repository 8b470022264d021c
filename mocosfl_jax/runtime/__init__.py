"""The process: hosts of a run, compiler settings, versions."""
