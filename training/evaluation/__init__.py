"""How near a student is to its teachers: figures, baselines, reports."""
