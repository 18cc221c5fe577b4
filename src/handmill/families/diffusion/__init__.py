"""The diffusion family: objective, denoiser, samplers, bound."""
