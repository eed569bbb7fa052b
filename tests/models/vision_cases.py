"""What the tests of vision transformers share: a small decoder, parameters without a compilation."""

import flax.linen as nn
import jax
import numpy as np


class Linear(nn.Module):
    """The smallest decoder: every token paints its patch of 4 x 4 pixels."""

    channels: int

    @nn.compact
    def __call__(self, tokens, size):
        batch, h, w, _ = tokens.shape
        y = nn.Dense(16 * self.channels, name="out")(tokens).reshape(batch, h, w, 4, 4, self.channels)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *size, self.channels)


def random_params(model, batch):
    """Random numbers in every parameter: no compilation of an initialisation."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
