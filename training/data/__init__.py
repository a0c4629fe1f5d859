"""Training data: captioned latents, image caches and rollouts, and how batches are drawn from them."""
