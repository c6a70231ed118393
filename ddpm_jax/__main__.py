"""python -m ddpm_jax: the same as python -m ddpm_jax.main."""

from ddpm_jax import main

main.run(main.main)
