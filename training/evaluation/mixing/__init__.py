"""How well styles mix: who paints, who judges, the figures and the report."""
