"""Teachers: frozen models with their text states, LoRAs folded into them, and the pool that moves them to the
device."""
