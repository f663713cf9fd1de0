"""One training step and one encoding of other libraries' TopK SAEs, through their own code.

Each maker takes the width of the states, the number of features, k, and the steps that training will take (for
schedules). Imports are inside: a peer that is missing or broken is named and does not stop the others.
"""

import itertools
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor], Any]


class Method(NamedTuple):
    """A TopK SAE of some library.

    Attributes:
        step: a training step on states `[batch, width]`.
        encode: what the library calls so.
        reconstruct: states -> their reconstruction.
        activations: states -> which features are active, `[batch, num_features]`, zero where not.
    """

    step: Step
    encode: Step
    reconstruct: Callable[[Tensor], Tensor]
    activations: Callable[[Tensor], Tensor]


Maker = Callable[[int, int, int, int], Method]


def saelens(width: int, features: int, k: int, steps: int) -> Method:
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    return _saelens(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=features, k=k)), steps)


def saelens_batch_topk(width: int, features: int, k: int, steps: int) -> Method:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    return _saelens(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=width, d_sae=features, k=k)), steps)


def saelens_matryoshka(width: int, features: int, k: int, steps: int) -> Method:
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    widths = [features // part for part in (16, 8, 4, 2, 1)]
    config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=width, d_sae=features, k=k, matryoshka_widths=widths)
    return _saelens(MatryoshkaBatchTopKTrainingSAE(config), steps)


def _saelens(sae: Any, steps: int) -> Method:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    settings = SAETrainerConfig(
        total_training_samples=2048 * steps, train_batch_size_samples=2048, lr=1e-3, lr_end=1e-4
    )
    trainer = SAETrainer(settings, sae, iter(()))

    def step(x: Tensor) -> float:
        loss = float(trainer.step(x).loss.detach())
        trainer.n_training_steps += 1
        return loss

    def activations(x: Tensor) -> Tensor:
        found = sae.encode(x)
        found = found.to_dense() if found.is_sparse else found
        # In inference SAELens compares with the threshold that training has followed.
        threshold = getattr(sae, "topk_threshold", None)
        return found if threshold is None else _above_threshold(sae, x)

    return Method(step, sae.encode, lambda x: sae.decode(activations(x)), activations)


def _above_threshold(sae: Any, x: Tensor) -> Tensor:
    _, pre = sae.encode_with_hidden_pre(x)
    return torch.relu(pre) * (pre > sae.topk_threshold)


def sparsify(width: int, features: int, k: int, steps: int) -> Method:
    # With Triton installed it takes Triton's kernels on a CPU too, where they fail.
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from schedulefree import ScheduleFreeWrapper
    from sparsify.config import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

    sae = SparseCoder(width, SparseCoderConfig(num_latents=features, k=k), device="cpu", dtype=torch.float32)
    rate = 5e-3 / (features / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD([{"params": sae.parameters(), "lr": rate}]), momentum=0.95)
    optimizer.train()
    since = torch.zeros(features, dtype=torch.long)

    def step(x: Tensor) -> float:
        """The body of its Trainer: hook and optimizer."""
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None)
        loss = out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since.add_(len(x))
        since[out.latent_indices.flatten()] = 0
        return float(out.fvu.detach())

    def activations(x: Tensor) -> Tensor:
        found = sae.encode(x)
        return torch.zeros(len(x), features).scatter(1, found.top_indices, found.top_acts)

    return Method(step, sae.encode, lambda x: sae(x=x, y=x, dead_mask=None).sae_out, activations)


def dictionary_learning(width: int, features: int, k: int, steps: int) -> Method:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=max(steps, 2000),
        activation_dim=width,
        dict_size=features,
        k=k,
        layer=0,
        lm_name="none",
        lr=1e-3,
        device="cpu",
        seed=0,
    )
    number = itertools.count()
    sae = trainer.ae
    return Method(lambda x: trainer.update(next(number), x), sae.encode, sae, sae.encode)


def overcomplete(width: int, features: int, k: int, steps: int) -> Method:
    _without_vision()
    from overcomplete.sae import TopKSAE, train_sae

    sae = TopKSAE(width, features, top_k=k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)

    def criterion(x: Tensor, x_hat: Tensor, _pre: Tensor, _codes: Tensor, _dictionary: Tensor) -> Tensor:
        return (x - x_hat).pow(2).mean()

    def step(x: Tensor) -> None:
        train_sae(sae, [x], criterion, optimizer, nb_epochs=1, monitoring=0)

    return Method(step, sae.encode, lambda x: sae.decode(sae.encode(x)[1]), lambda x: sae.encode(x)[1])


def _without_vision() -> None:
    """overcomplete imports torchvision and timm for its image models, which are not measured here."""
    names = ("torchvision", "torchvision.transforms", "timm")
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))
    for name in ("Compose", "Resize", "CenterCrop", "ToTensor", "Normalize"):
        setattr(sys.modules["torchvision.transforms"], name, object)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    import matplotlib
    import matplotlib.cm

    if not hasattr(matplotlib.cm, "get_cmap"):
        # overcomplete 0.3 with a newer matplotlib.
        matplotlib.cm.get_cmap = lambda name=None, *_: matplotlib.colormaps[name]


QUALITY_PEERS: dict[str, Maker] = {
    "SAELens batch_topk": saelens_batch_topk,
    "SAELens batch_topk, prefixes": saelens_matryoshka,
}
"""Other architectures, for what they reach."""

PEERS: dict[str, Maker] = {
    "SAELens": saelens,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "overcomplete": overcomplete,
}
