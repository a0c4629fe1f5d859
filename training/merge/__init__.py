"""Merging models into one with a style each, without training: a style bank of what sets them apart, and a report on what it keeps."""
