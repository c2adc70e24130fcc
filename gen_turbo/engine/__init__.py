"""A reducer at work on a denoiser: what stands in front of the model and its layers, and decides over every step."""
