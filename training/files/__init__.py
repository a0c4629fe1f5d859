"""Any model file as people have it: which layout it is, what is in it, one layout into another."""
