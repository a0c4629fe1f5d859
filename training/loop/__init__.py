"""The step of DMM (arXiv:2504.12364, Sec. 3.4): losses, objective, trainer, the student and its optimisers."""
