"""Several processes of one run: their communication, devices and rows, and how the student is replicated or sharded."""
