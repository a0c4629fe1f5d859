"""Everything that a GPU can tell, by one command: ``make gpu``.

A machine with a GPU is to be had rarely: bare, without a network, for minutes. So each stage (``stages``) runs in a process of its own
under a time limit and leaves its row as it ends (``runner``, ``rows``); a call that is cut off goes on with the next stage when it is
made again. ``make gpu DEVICE=cpu SIZE=tiny`` rehearses all of it without a GPU; ``make gpu-pack`` prepares what such a machine lacks
(``pack``), and ``make gpu-report`` writes the rows into docs/performance.md (``report``).
"""
