"""python -m ddpm_jax: the same as python -m ddpm_jax.main."""

from ddpm_jax.main import main

if __name__ == "__main__":
    main()
