"""Model files of all layouts: reading, describing and converting them; style files; digests; pieces of long work."""
