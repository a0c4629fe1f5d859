"""What a run learns from: captioned latents, image caches, rollouts, and how a batch is drawn from them."""
