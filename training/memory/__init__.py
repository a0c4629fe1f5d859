"""What a run needs of memory, and which settings fit into what there is."""
