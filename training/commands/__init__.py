"""The subcommands of ``dmm``: each a thin face on a function that the nodes call too."""
