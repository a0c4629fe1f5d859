"""The method of DMM (arXiv:2504.12364): UNet and style side, schedule, sampling, checkpoint files. No ComfyUI, no
training."""
