"""The variational auto-encoder of Kingma & Welling 2014 as a Method, with the trainer and data of the other Methods.

    log p(x) ≥ ELBO = E_q(z|x)[log p(x|z)] − KL(q(z|x) ‖ p(z))                     Kingma & Welling (3)
    q(z|x) = N(μ(x), diag σ²(x)),  p(z) = N(0, I),  p(x|z) = ∏ Bernoulli(x_i; y_i(z))     appendix C

Encoder and decoder have one hidden layer of 500 ReLUs, as in Liu 2023 §1; Kingma & Welling use tanh. Grey values
are x = image/255 in [0, 1], and log p(x|z) = Σ x_i log y_i + (1 − x_i) log(1 − y_i) is the expected log-likelihood
of an image whose pixels are drawn black or white with the probabilities x. So the ELBO bounds the mean log-likelihood
of such binary images, in nats per image. It is not a likelihood of 8-bit images: do not convert it to bits/dim or
compare it with `--mode=nll` of a diffusion.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import augmentation, options
from ddpm_jax.method import Method, NoOptions, fold_in_each
from ddpm_jax.process import gaussians

SECTIONS = ("vae",)  # sections of a config in addition to those of every Method


class Network(nn.Module):
    """Encoder and decoder for D pixels and J latents; Kingma & Welling, appendix C.

    Attributes:
      draws: number of draws of z for each image in training, L in the paper; see `experiments/vae/draws.py`.
    """

    pixels: int
    latents: int
    hidden: int
    draws: int = 1

    def setup(self):
        self.encoder_hidden = nn.Dense(self.hidden)
        self.encoder_mean = nn.Dense(self.latents)
        self.encoder_log_variance = nn.Dense(self.latents)
        self.decoder_hidden = nn.Dense(self.hidden)
        self.decoder_logits = nn.Dense(self.pixels)

    def encode(self, x):
        """μ and log σ² of q(z|x): two [B, J] from grey values [B, D] in [0, 1]."""
        h = nn.relu(self.encoder_hidden(x))
        return self.encoder_mean(h), self.encoder_log_variance(h)

    def decode(self, z):
        """logit y(z) [..., D] from z [..., J]."""
        return self.decoder_logits(nn.relu(self.decoder_hidden(z)))

    def __call__(self, x):  # uses every parameter, for `init`
        return self.decode(self.encode(x)[0])


def make_network(
    image_shape: tuple[int, ...], *, latents: int, hidden: int = 500, draws: int = 1
) -> Network:
    """The network of a config's section vae.

    Raises:
      ValueError: one of the three numbers is below 1.
    """
    if min(latents, hidden, draws) < 1:
        raise ValueError(
            f"latents, hidden and draws must be at least 1, got {latents}, {hidden} and {draws}"
        )
    return Network(int(np.prod(image_shape)), latents, hidden, draws)


def grey(images):
    """uint8 [B, H, W, C] to [B, D] in [0, 1]."""
    return images.reshape(images.shape[0], -1).astype(jnp.float32) / 255.0


def log_bernoulli(x, logits):
    """Σ x_i log y_i + (1 − x_i) log(1 − y_i) over the last axis; any shape before it."""
    return jnp.sum(x * logits - jax.nn.softplus(logits), axis=-1)


def parts(network: Network, params, x, eps):
    """The two parts of the ELBO, Kingma & Welling (10), and the log ratio for importance weights.

    Args:
      x: [B, D] in [0, 1].
      eps: N(0, I), [K, B, J], for K draws of z.

    Returns:
      log p(x|z) [K, B]; KL(q(z|x) ‖ p(z)) [B]; log p(z) − log q(z|x) [K, B]; all in nats.
    """
    apply = network.bind({"params": params})
    mean, log_variance = apply.encode(x)
    kl = jnp.sum(gaussians.kl(mean, log_variance, 0.0, 0.0), axis=-1)
    z = mean[None] + jnp.exp(0.5 * log_variance)[None] * eps
    reconstruction = log_bernoulli(x[None], apply.decode(z))
    log_ratio = 0.5 * jnp.sum(jnp.square(eps) + log_variance[None] - jnp.square(z), axis=-1)
    return reconstruction, kl, log_ratio


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VAE(Method):
    """The auto-encoder as a Method."""

    network: Network
    image_shape: tuple[int, int, int]
    flip: bool = False
    shift: int = 0
    metric_names = ("reconstruction", "kl")

    def init(self, key):
        return self.network.init(key, jnp.zeros((1, self.network.pixels)))["params"]

    def loss_fn(self, params, loss_state, key, batch):
        """The negative ELBO of each image, in nats."""
        network = self.network
        keys = jax.vmap(jax.random.split)(fold_in_each(key, batch["index"]))
        eps_keys, flip_keys = keys[:, 0], keys[:, 1]
        images = augmentation.augmented(flip_keys, batch["image"], flip=self.flip, shift=self.shift)
        shape = (network.draws, network.latents)
        eps = jax.vmap(lambda key: jax.random.normal(key, shape), out_axes=1)(eps_keys)
        reconstruction, kl, _ = parts(network, params, grey(images), eps)
        error = -jnp.mean(reconstruction, axis=0)
        weight = jnp.ones_like(kl)
        return error + kl, {"reconstruction": (error, weight), "kl": (kl, weight)}, ()

    def sample(self, params, key, index, label, sampling=NoOptions()):
        """The probabilities y(z) of z ~ N(0, I) as images, as in Kingma & Welling's figures."""
        del label, sampling
        keys = fold_in_each(key, index)
        z = jax.vmap(lambda key: jax.random.normal(key, (self.network.latents,)))(keys)
        return decoded(self.network, params, z).reshape(-1, *self.image_shape)


def make(config) -> VAE:
    """The Method of a config, from its sections data and vae.

    Raises:
      ConfigError: a field that is unknown, of a wrong type or impossible.
    """
    image_shape = tuple(config.data.image_shape)
    network = options.build(make_network, config.vae, "config.vae", image_shape=image_shape)
    return VAE(network=network, image_shape=image_shape, **augmentation.of(config.data))


def decoded(network: Network, params, z):
    """y(z) as an image in [−1, 1]: [B, D] from z [B, J]."""
    return jnp.tanh(0.5 * network.bind({"params": params}).decode(z))  # 2 sigmoid(a) − 1
