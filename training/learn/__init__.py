"""A new style from a few pictures, and the blend of known styles that is nearest to them."""
