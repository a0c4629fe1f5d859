"""Several processes, one run: who there is, who has which rows, and what of the student lies where."""
