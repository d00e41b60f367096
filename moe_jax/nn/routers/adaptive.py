"""Adaptive routers: what they say of a token depends on the tokens before it, by a state that runs along the sequence.

Both start as the linear router of the same key. The state begins anew with every sequence, and a masked token leaves it
as it was. They are causal by construction; generating token by token means to carry the state along.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.router import RouterLogits, draw_kernel
from moe_jax.types import Array


class RecurrentRouter(nnx.Module):
    """A linear router with a memory, the minimal GRU of Feng et al. (2410.01201): 2 (D E + 2 D H + H E) FLOPs a token.

        r_t = sigmoid(x_t W_r),  h_t = (1 - r_t) h_{t-1} + r_t (x_t W_h),  z_t = x_t W + h_t W_out,  h_0 = 0

    The gate r sees the token alone, which makes the recurrence a parallel scan of logarithmic depth. The combination is
    this project's; routers that recur over layers instead of over time are another thing.
    """

    def __init__(self, width: int, num_experts: int, *, hidden: int = 16, key: Array):
        """Draws `kernel [D, E]` as a linear router does, and `w_in [D, 2H]` from N(0, 1/D); `w_out [H, E]` starts at 0.

        Args:
          width: D.
          num_experts: E.
          hidden: H, the width of the state.
          key: consumed.

        Raises:
          ValueError: a width below 1.
        """
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1")
        self.kernel = nnx.Param(draw_kernel(key, width, num_experts))
        self.w_in = nnx.Param(draw_kernel(jax.random.fold_in(key, 1), width, 2 * hidden))
        self.w_out = nnx.Param(jnp.zeros((hidden, num_experts)))

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token in the light of those before it; arguments as `Router`."""
        del key
        x = x.astype(jnp.float32)
        gate, candidate = jnp.split(x @ self.w_in[...], 2, axis=-1)
        renewal = jax.nn.sigmoid(gate)
        kept, added = 1 - renewal, renewal * candidate
        if token_mask is not None:
            kept, added = jnp.where(token_mask[..., None], kept, 1.0), jnp.where(token_mask[..., None], added, 0.0)
        _, state = jax.lax.associative_scan(_follow, (kept, added), axis=1)
        return RouterLogits(x @ self.kernel[...] + state @ self.w_out[...])


def _follow(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two stretches of `h -> kept h + added` as one."""
    return earlier[0] * later[0], earlier[1] * later[0] + later[1]


class LoadAwareRouter(nnx.Module):
    """A linear router that turns tokens away from the experts that earlier tokens of the sequence went to.

        z_t = x_t W - strength (E m_t - 1),  m_{t+1} = decay m_t + (1 - decay) softmax(z_t),  m_1 = 1/E

    m is a running mean of the soft assignments and sums to 1; an expert of twice the mean load loses `strength`. It is
    this project's: balance as a reflex within a sequence, where a balancer's bias (2408.15664) learns over steps. Near
    balance an imbalance changes by the factor `decay - (1 - decay) strength` with every token, so a strength above
    (1 + decay) / (1 - decay) swings. The recurrence goes through the softmax and runs token by token. It knows nothing
    of the topology: a closed expert keeps the soft assignments that a rule passes on. 2 D E FLOPs a token.
    """

    def __init__(self, width: int, num_experts: int, *, strength: float = 1.0, decay: float = 0.9, key: Array):
        """Draws `kernel [D, E]` from N(0, 1/D).

        Args:
          width: D.
          num_experts: E.
          strength: in logits for each multiple of the mean load.
          decay: in [0, 1); the mean reaches back over about 1 / (1 - decay) tokens.
          key: consumed.

        Raises:
          ValueError: negative strength, or a decay outside of [0, 1).
        """
        if strength < 0 or not 0 <= decay < 1:
            raise ValueError(f"strength={strength} must not be negative and decay={decay} must be in [0, 1)")
        self.strength, self.decay = strength, decay
        self.kernel = nnx.Param(draw_kernel(key, width, num_experts))

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token in the light of those before it; arguments as `Router`."""
        del key
        wishes = x.astype(jnp.float32) @ self.kernel[...]
        is_token = jnp.ones(x.shape[:2], bool) if token_mask is None else token_mask
        num_experts = wishes.shape[-1]

        def step(load: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
            wish, is_token = token
            logits = wish - self.strength * (num_experts * load - 1)
            moved = self.decay * load + (1 - self.decay) * jax.nn.softmax(logits)
            return jnp.where(is_token[:, None], moved, load), logits

        even = jnp.full((x.shape[0], num_experts), 1 / num_experts)
        _, logits = jax.lax.scan(step, even, (jnp.swapaxes(wishes, 0, 1), is_token.T))  # over S: (B, S, E) -> (S, B, E)
        return RouterLogits(jnp.swapaxes(logits, 0, 1))
