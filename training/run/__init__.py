"""A run from files to file: load, train, save, resume, watch."""
