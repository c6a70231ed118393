"""A whole DDPM on one page, from data to picture, without the library: Ho et al. 2020, Algorithms 1 and 2.

    python experiments/one_page.py            two minutes on a laptop; writes one_page.png

It reads beside `ddpm_jax/ddpm.py`: on the same keys its losses and samples are those of the library, which a test checks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from sklearn.datasets import load_digits

T, SHAPE = 1000, (8, 8, 1)
BETA = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.cumprod(1 - BETA)


class Network(nn.Module):
    """ε̂(x_t, t): residual convolutions that are scaled and shifted by an embedding of t."""

    out_channels: int = 1
    width: int = 64

    @nn.compact
    def __call__(self, x, t, labels=None):
        frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(self.width) / self.width)
        angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
        embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        embedding = nn.swish(nn.Dense(self.width)(embedding))
        h = nn.Conv(self.width, (3, 3))(x)
        for _ in range(4):
            y = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm(8)(h)))
            scale, shift = jnp.split(
                nn.Dense(2 * self.width)(embedding)[:, None, None, :], 2, axis=-1
            )
            y = nn.GroupNorm(8)(y) * (1 + scale) + shift
            h = h + nn.Conv(self.width, (3, 3))(nn.swish(y))
        return nn.Conv(self.out_channels, (3, 3), kernel_init=nn.initializers.zeros)(nn.swish(h))


NETWORK = Network()


def table(values, t, x):
    """values[t] in float32, to be broadcast over the images x."""
    return jnp.asarray(values, jnp.float32)[t].reshape(-1, *(1,) * (x.ndim - 1))


def losses(params, key, images, index):
    """Algorithm 1: ‖ε − ε̂(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖² of each image uint8 [B, H, W, C]."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 5))(index)
    t = jax.vmap(lambda key: jax.random.randint(key, (), 0, T))(keys[:, 0])
    eps = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys[:, 1])
    x_0 = images.astype(jnp.float32) / 127.5 - 1
    x_t = table(np.sqrt(ALPHA_BAR), t, x_0) * x_0 + table(np.sqrt(1 - ALPHA_BAR), t, x_0) * eps
    return jnp.mean(jnp.square(NETWORK.apply({"params": params}, x_t, t) - eps), axis=(1, 2, 3))


def sample(params, key, count):
    """Algorithm 2 with σ_t² = β_t, and x̂_0 clipped to [−1, 1] as in Ho et al.'s code."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count))
    previous = np.append(1.0, ALPHA_BAR[:-1])
    of_x_0 = np.sqrt(previous) * BETA / (1 - ALPHA_BAR)
    of_x_t = np.sqrt(1 - BETA) * (1 - previous) / (1 - ALPHA_BAR)
    std = np.sqrt(np.append(0.0, BETA[1:]))

    def noise(t):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), SHAPE))(keys)

    def step(x, t):
        eps = NETWORK.apply({"params": params}, x, jnp.full(count, t))
        x_0 = x * table(ALPHA_BAR**-0.5, t, x) - table((1 / ALPHA_BAR - 1) ** 0.5, t, x) * eps
        x_0 = jnp.clip(x_0, -1, 1)
        mean = table(of_x_0, t, x) * x_0 + table(of_x_t, t, x) * x
        return mean + table(std, t, x) * noise(t), None

    x, _ = jax.lax.scan(step, noise(np.uint32(2**32 - 1)), jnp.arange(T)[::-1])
    return x


def main(num_steps=3000, batch_size=64):
    digits = np.rint(load_digits().images * 255 / 16).astype(np.uint8)[..., None]
    params = NETWORK.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))["params"]
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    @jax.jit
    def update(params, state, key, images):
        mean = lambda params: losses(params, key, images, jnp.arange(len(images))).mean()  # noqa: E731
        loss, gradient = jax.value_and_grad(mean)(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, rng = tx.init(params), np.random.default_rng(0)
    for step in range(num_steps):
        key = jax.random.fold_in(jax.random.key(1), step)
        images = digits[rng.integers(0, len(digits), batch_size)]
        params, state, loss = update(params, state, key, images)
        if step % 500 == 0:
            print(f"step {step}, loss {loss:.3f}")
    x = np.asarray(jax.jit(sample, static_argnums=2)(params, jax.random.key(2), 64))
    pixels = np.clip((x + 1) * 127.5, 0, 255).astype(np.uint8).reshape(8, 8, 8, 8)
    Image.fromarray(np.block([list(row) for row in pixels])).resize((512, 512)).save("one_page.png")


if __name__ == "__main__":
    main()
