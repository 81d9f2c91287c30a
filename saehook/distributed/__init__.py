"""Training on several devices: latents sharded, batches split, with torch.distributed."""
