"""Memory that a run needs, and the settings that fit into a budget."""
