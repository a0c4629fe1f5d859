"""Latents to pictures without ComfyUI, contact sheets of them, thumbnails."""
