"""python -m ddpm_jax.benchmark: the same as python -m ddpm_jax.main --mode=benchmark."""

from ddpm_jax.main import main

if __name__ == "__main__":
    main(mode="benchmark")
