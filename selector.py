"""The selector: it judges code grids as a whole, and chooses among those that the priors propose.

A PixelCNN samples one code after another. It is trained given codes of real slices, but samples given its own, so small
errors add up, and distant parts of a grid agree too little. The selector is a classifier that distinguishes grids of
real slices from proposed ones. Its logit estimates by how much a grid is more probable among real slices than among
proposals:

    w(codes) ≈ log p_real(codes) − log p_prior(codes).

For each sample the priors propose K grids, and one of them is chosen with a probability proportional to exp(w)
(sampling importance resampling, Rubin 1987). With many candidates, samples follow p_prior · exp(w), normalised: a
residual energy-based model with the energy −w.

References:
    Gutmann & Hyvärinen 2010, "Noise-Contrastive Estimation" (the classifier's logit as a ratio of densities)
    Deng et al. 2020, "Residual Energy-Based Models for Text Generation"
    Lawson et al. 2019, "Energy-Inspired Models: Learning with Sampler-Induced Distributions" (likelihood)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import model
from layers import PACKAGE, Tensor, replica_index_and_count

COARSEST = 6  # Grids are halved until they are not larger.


@keras.saving.register_keras_serializable(PACKAGE)
class Selector(keras.Model):
    """Predicts by how much a grid of codes is more probable among real slices than among those that the priors propose.

    Codes are embedded, and coarser levels enlarged to the finest grid. The network also sees the mirror image of the
    grid, because brains are nearly symmetric. Convolutions of stride 2 halve the grid until at most `COARSEST` cells
    per side remain. A dense layer then sees all of them at once. Its features are scaled by others of the slice
    position and the augmentation.

    Args:
        num_embeddings: Number of codes, K.
        grids: Height and width of the code grid of each level, coarsest first.
        embedding_dim: Length of the vector that a code is embedded as.
        filters: Number of channels of the convolutions; the dense layer has twice as many.
        dropout: Dropout rate before the dense layer.
        use_position: Whether the slice position is used.

    Example: For codes (B, 12, 12) int32 and slice positions (B,) int32:

        model({"codes_0": codes, "positions": positions}) -> (B,) float32
    """

    def __init__(
        self,
        num_embeddings: int,
        grids: Sequence[int],
        embedding_dim: int = 32,
        filters: int = 64,
        dropout: float = 0.5,
        use_position: bool = True,
        name: str = "selector",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.settings: dict[str, Any] = {
            "num_embeddings": num_embeddings,
            "grids": list(grids),
            "embedding_dim": embedding_dim,
            "filters": filters,
            "dropout": dropout,
            "use_position": use_position,
        }
        self.grids, self.use_position = tuple(grids), use_position
        self.embeddings = [
            keras.layers.Embedding(num_embeddings, embedding_dim, name=f"{prefix}embedding")
            for prefix in model.level_prefixes(len(grids))
        ]
        options = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
        self.convolutions = [keras.layers.Conv2D(filters, 3, **options, name="first")]
        side = grids[-1]
        while side > COARSEST or len(self.convolutions) < 2:
            side = -(-side // 2)
            name = f"down_{len(self.convolutions) - 1}"
            self.convolutions.append(keras.layers.Conv2D(filters, 4, strides=2, **options, name=name))
        self.flatten = keras.layers.Flatten(name="flatten")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")
        self.condition = keras.layers.Dense(filters, activation="relu", name="condition")
        self.scale = keras.layers.Dense(2 * filters, name="scale")
        self.hidden = keras.layers.Dense(2 * filters, activation="relu", name="hidden")
        self.logit = keras.layers.Dense(1, dtype="float32", name="logit")
        self.accuracy = keras.metrics.Mean(name="accuracy")
        codes = {f"codes_{level}": keras.Input((grid, grid), dtype="int32") for level, grid in enumerate(grids)}
        self({**codes, "positions": keras.Input((), dtype="int32")})  # creates the weights

    @classmethod
    def untrained(cls, vqvae: model.VQVAE, **settings: Any) -> "Selector":
        """Return a selector for the codes of a VQ-VAE; see the class. Uses the global random seed.

        Its embeddings begin as the codebook vectors, shifted and scaled to mean 0 and variance 1.
        """
        settings |= {name: vqvae.settings[name] for name in ("num_embeddings", "grids", "embedding_dim")}
        selector = cls(**settings)
        for embedding, quantizer in zip(selector.embeddings, vqvae.quantizers, strict=True):
            vectors = ops.convert_to_numpy(quantizer.embeddings)
            embedding.set_weights([(vectors - vectors.mean()) / max(vectors.std(), 1e-6)])
        return selector

    def call(self, inputs: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Return log weights.

        Args:
            inputs: "codes_0", "codes_1", …: code indices (B, h, w) int32 per level, the coarsest first; and what
                `model.slice_features` reads.
            training: Whether dropout is active.

        Returns:
            (B,) float32.
        """
        levels = []
        for level, (embedding, grid) in enumerate(zip(self.embeddings, self.grids, strict=True)):
            side = self.grids[-1] // grid
            embedded = embedding(inputs[f"codes_{level}"])
            levels.append(ops.repeat(ops.repeat(embedded, side, axis=1), side, axis=2))
        features = ops.concatenate(levels, axis=-1)
        features = ops.concatenate([features, ops.flip(features, axis=2)], axis=-1)
        for convolution in self.convolutions:
            features = convolution(features)
        features = self.hidden(self.dropout(self.flatten(features), training=training))
        condition = self.condition(model.slice_features(inputs, self.use_position))
        return self.logit(features * (1 + self.scale(condition)))[:, 0]

    def compute_loss(
        self,
        x: Any = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """Return the mean logistic loss, a scalar, and update the metric.

        Args:
            x, sample_weight, training: Ignored.
            y: (B,) float32, 1 for grids of real slices and 0 for proposed ones.
            y_pred: Log weights (B,).
        """
        correct = ops.cast(ops.equal(y_pred > 0, y > 0.5), "float32")
        self.accuracy.update_state(ops.mean(correct), sample_weight=ops.shape(y)[0])
        loss = ops.mean(ops.softplus(ops.where(y > 0.5, -y_pred, y_pred)))
        return loss / replica_index_and_count()[1]  # Keras sums the gradients of all replicas.

    def get_config(self) -> dict[str, Any]:
        return {**self.settings, "name": self.name}


def choose(log_weights: np.ndarray, random: np.random.Generator, is_common: bool = False) -> np.ndarray:
    """Choose one candidate for each sample, with a probability proportional to its weight.

    Args:
        log_weights: (N, K), of K candidates for each of N samples.
        random: Generator of random numbers.
        is_common: Whether all samples are chosen with the same random numbers.

    Returns:
        (N,) indices into the N · K candidates, which are those of one sample after those of another.
    """
    count, candidates = log_weights.shape
    # The largest of log weights plus Gumbel noise is a sample of the categorical distribution.
    gumbel = random.gumbel(size=(1 if is_common else count, candidates))
    return np.arange(count) * candidates + (log_weights + gumbel).argmax(axis=1)


def log_likelihood_gain(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Bound from below what choosing among K candidates adds to the log-likelihood of grids under the priors.

    The bound is that of Lawson et al. 2019 for self-normalised importance sampling, with K − 1 proposals for each grid.

    Args:
        own: (N,) log weights of the grids.
        others: (N, K − 1) log weights of grids that the priors propose.

    Returns:
        (N,) in nats, at most log K.
    """
    both = np.concatenate([own[:, None], others], axis=1)
    return own + np.log(both.shape[1]) - np.logaddexp.reduce(both, axis=1)
