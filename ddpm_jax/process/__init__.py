"""The mathematics of diffusion over tables of (α, σ): neither networks nor files."""
