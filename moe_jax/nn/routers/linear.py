"""The linear router, and the noise that it is trained with.

    z = (x W + b) / temperature
    x <- x * u + n in training, u ~ U(1 - jitter, 1 + jitter), n ~ N(0, input_noise^2), for every coordinate

The multiplicative jitter is Switch's (2101.03961). Only the router sees the disturbed x.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.router import RouterLogits, draw_kernel
from moe_jax.types import Array


class LinearRouter(nnx.Module):
    """Logits `x W`: 2 D E FLOPs a token."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        use_bias: bool = False,
        temperature: float = 1.0,
        jitter: float = 0.0,
        input_noise: float = 0.0,
        learned_noise: bool = False,
        key: Array,
    ):
        """Draws `kernel [D, E]` from N(0, 1/D); bias and noise kernel start at zero.

        Args:
          width: D.
          num_experts: E.
          use_bias: whether the logits have a trained bias b `[E]`. It moves the gates too, unlike a balancer's.
          temperature: divides the logits; above 1 it flattens their softmax.
          jitter: half the range of the factor on each coordinate of x.
          input_noise: standard deviation of what is added to each coordinate of x; x has mean square 1 behind a norm.
          learned_noise: whether to give `noise_scale = softplus(x W_noise)` for rules that add noise to the logits, the
            noisy top-k of Shazeer (1701.06538, eq. 4). Costs another 2 D E FLOPs.
          key: consumed.

        Raises:
          ValueError: a temperature that is not positive, a jitter outside of [0, 1), or negative noise.
        """
        if temperature <= 0 or not 0 <= jitter < 1 or input_noise < 0:
            raise ValueError(
                f"temperature={temperature} must be positive, jitter={jitter} in [0, 1), "
                f"input_noise={input_noise} not negative"
            )
        self.temperature, self.jitter, self.input_noise = temperature, jitter, input_noise
        self.kernel = nnx.Param(draw_kernel(key, width, num_experts))
        self.bias = nnx.Param(jnp.zeros(num_experts)) if use_bias else None
        self.noise_kernel = nnx.Param(jnp.zeros((width, num_experts))) if learned_noise else None

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token by itself; arguments as `Router`. The selection bias is not added here."""
        del token_mask
        x = x.astype(jnp.float32)
        if key is not None:
            x = _disturb(x, self.jitter, self.input_noise, key)
        logits = x @ self.kernel[...]
        if self.bias is not None:
            logits += self.bias[...].reshape(1, 1, -1)
        noise_scale = None
        if self.noise_kernel is not None:
            noise_scale = jax.nn.softplus(x @ self.noise_kernel[...]) / self.temperature
        return RouterLogits(logits / self.temperature, noise_scale)


def _disturb(x: Array, jitter: float, noise: float, key: Array) -> Array:
    """Training's jitter and noise on the router's input."""
    jitter_key, noise_key = jax.random.split(key)
    if jitter:
        x *= jax.random.uniform(jitter_key, x.shape, minval=1 - jitter, maxval=1 + jitter)
    if noise:
        x += noise * jax.random.normal(noise_key, x.shape)
    return x
