"""The demo family's pictures: procedural scenes and the looks that they are drawn in."""
