"""Who looks at a run while it trains, and what may be asked of it."""
