"""The denoiser: a diffusers UNet evaluated in full or by its shallow branch, step by step, in a pipeline."""
