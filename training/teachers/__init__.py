"""Teachers: frozen models with the text states of their own, with LoRAs folded in, on the device or waiting in RAM."""
