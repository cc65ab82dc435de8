"""The selector: it judges code grids as a whole, and chooses among those that the priors propose.

A PixelCNN samples one code after another. It is trained given codes of real slices, but samples given its own, so small
errors add up, and distant parts of a grid agree too little. The selector is a classifier that distinguishes grids of
real slices from proposed ones. Its logit estimates by how much a grid is more probable among real slices than among
proposals:

    w(codes) ≈ log p_real(codes) − log p_prior(codes).

For each sample the priors propose K grids, and one of them is chosen with a probability proportional to exp(w)
(sampling importance resampling, Rubin 1987). With many candidates, samples follow p_prior · exp(w), normalised: a
residual energy-based model with the energy −w.

There are few real slices, so a classifier errs on unseen grids, and more of the same kind err differently. Several
are trained together, and their logits are averaged.

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
from layers import PACKAGE, Shape, Tensor, replica_index_and_count

# The weights of finished runs fit these numbers only.
COARSEST = 6  # Grids are halved until they are not larger.
NUM_CLASSIFIERS = 3


@keras.saving.register_keras_serializable(PACKAGE)
class Selector(keras.Model):
    """Predicts by how much a grid of codes is more probable among real slices than among those that the priors propose.

    Codes are embedded, and coarser levels enlarged to the finest grid. The mirror image of the grid is added, because
    brains are nearly symmetric. `NUM_CLASSIFIERS` instances of `GridClassifier` read both.

    Args:
        num_embeddings: Number of codes, K.
        grids: Height and width of the code grid of each level, coarsest first.
        embedding_dim: Length of the vector that a code is embedded as.
        filters, units, dropout: See `GridClassifier`.
        use_position: Whether the slice position is used.

    Example: For codes (B, 12, 12) int32 and slice positions (B,) int32:

        model({"codes_0": codes, "positions": positions})             -> logits (B, NUM_CLASSIFIERS) float32
        model.log_weights({"codes_0": codes, "positions": positions}) -> (B,) float32, their mean
    """

    def __init__(
        self,
        num_embeddings: int,
        grids: Sequence[int],
        embedding_dim: int = 32,
        filters: int = 48,
        units: int = 64,
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
            "units": units,
            "dropout": dropout,
            "use_position": use_position,
        }
        self.grids, self.use_position = tuple(grids), use_position
        self.embeddings = [
            keras.layers.Embedding(num_embeddings, embedding_dim, name=f"{prefix}embedding")
            for prefix in model.level_prefixes(len(grids))
        ]
        self.classifiers = [
            GridClassifier(filters, units, dropout, name=f"classifier_{i}") for i in range(NUM_CLASSIFIERS)
        ]
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
        """Return the logits of each classifier.

        Args:
            inputs: "codes_0", "codes_1", …: code indices (B, h, w) int32 per level, the coarsest first; and what
                `model.slice_features` reads.
            training: Whether dropout is active.

        Returns:
            (B, NUM_CLASSIFIERS) float32.
        """
        levels = []
        for level, (embedding, grid) in enumerate(zip(self.embeddings, self.grids, strict=True)):
            side = self.grids[-1] // grid
            embedded = embedding(inputs[f"codes_{level}"])
            levels.append(ops.repeat(ops.repeat(embedded, side, axis=1), side, axis=2))
        features = ops.concatenate(levels, axis=-1)
        features = ops.concatenate([features, ops.flip(features, axis=2)], axis=-1)
        slices = model.slice_features(inputs, self.use_position)
        logits = [classifier(features, slices, training=training) for classifier in self.classifiers]
        return ops.concatenate(logits, axis=-1)

    def log_weights(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the mean logit (B,) float32 of all classifiers; see `call`."""
        return ops.mean(self(inputs), axis=-1)

    def compute_loss(
        self,
        x: Any = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """Return the logistic loss, a scalar, and update the metric.

        Args:
            x, sample_weight: Ignored.
            y: (B,) float32, 1 for grids of real slices and 0 for proposed ones.
            y_pred: Logits (B, NUM_CLASSIFIERS).
            training: Whether each classifier is judged by itself. If not, the loss is that of their mean logit.
        """
        mean = ops.mean(y_pred, axis=-1, keepdims=True)
        logits, is_real = y_pred if training else mean, y[:, None] > 0.5
        correct = ops.cast(ops.equal(mean > 0, is_real), "float32")
        self.accuracy.update_state(ops.mean(correct), sample_weight=ops.shape(y)[0])
        loss = ops.mean(ops.softplus(ops.where(is_real, -logits, logits)))
        return loss / replica_index_and_count()[1]  # Keras sums the gradients of all replicas.

    def get_config(self) -> dict[str, Any]:
        return {**self.settings, "name": self.name}


@keras.saving.register_keras_serializable(PACKAGE)
class GridClassifier(keras.layers.Layer):
    """Classifies grids of vectors as a whole.

    Convolutions of stride 2 halve the grid, at least once, until at most `COARSEST` cells per side remain. A dense
    layer sees all of them at once. Its output is scaled by features of the slice.

    Args:
        filters: Number of channels of the convolutions.
        units: Number of outputs of the dense layer.
        dropout: Dropout rate before the dense layer.
    """

    def __init__(self, filters: int, units: int, dropout: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"filters": filters, "padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
        self.convolutions = [keras.layers.Conv2D(kernel_size=3, **self.options, name="first")]
        self.flatten = keras.layers.Flatten(name="flatten")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")
        self.hidden = keras.layers.Dense(units, activation="relu", name="hidden")
        self.condition = keras.layers.Dense(units, activation="relu", name="condition")
        self.scale = keras.layers.Dense(units, name="scale")
        self.logit = keras.layers.Dense(1, dtype="float32", name="logit")

    def build(self, grid_shape: Shape, slices_shape: Shape) -> None:
        side: Any = grid_shape[1]
        while side > COARSEST or len(self.convolutions) < 2:
            side, name = -(-side // 2), f"down_{len(self.convolutions) - 1}"
            self.convolutions.append(keras.layers.Conv2D(kernel_size=4, strides=2, **self.options, name=name))

    def call(self, grid: Tensor, slices: Tensor, training: bool = False) -> Tensor:
        """Grids (B, h, w, C) and features of the slices (B, F) -> logits (B, 1) float32."""
        for convolution in self.convolutions:
            grid = convolution(grid)
        features = self.hidden(self.dropout(self.flatten(grid), training=training))
        return self.logit(features * (1 + self.scale(self.condition(slices))))


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
