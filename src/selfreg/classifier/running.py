"""RunningDependence, RunningScale: what the two terms need of the states, where those move in training.

Shapes: B texts (or pairs) of a batch, D hidden size, U unintended features, P columns held constant.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfreg.classifier.tasks import Task, held_constant

_Sums = dict[str, Tensor]


class RunningDependence:
    """C_c = Cov(h, z_c | label) / sd(z_c | label) as `penalty.dependence_directions` has it, from batches.

    It keeps exponentially weighted sums of the products of h, z and the constant columns k, none of them centred, and
    takes what is held constant off the sums: Cov(z, h | k) = E[z h] - E[z k] E[k k]⁺ E[k h], likewise for the variance
    of z. Centring each batch by itself would lose a degree of freedom for every label in it, so nearly all of a batch
    with as many texts as labels; here P degrees of freedom are lost once, of the `(1 + momentum) / (1 - momentum)`
    batches that the sums remember. With `momentum=1` one pass over a data set gives exactly what
    `dependence_directions` gives for all of it.

    What moves the mean states of a label during those batches counts as covariance: where training moves them fast, a
    smaller `momentum` follows better.

    Args:
        num_features: U.
        hidden_size: D.
        num_constant: P, the columns of `batch_constant`.
        momentum: what each update leaves of the sums before it, 0 to 1.
        min_texts: before so many were seen, nothing is said.

    Raises:
        ValueError: `momentum` is not in that range.
    """

    def __init__(
        self, num_features: int, hidden_size: int, num_constant: int, momentum: float = 0.99, min_texts: int = 32
    ) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must be from 0 to 1")
        self.momentum, self.min_texts = momentum, min_texts
        shapes = {
            "seen": (),
            "count": (),
            "constant_constant": (num_constant, num_constant),
            "constant_states": (num_constant, hidden_size),
            "constant_activations": (num_constant, num_features),
            "activations_states": (num_features, hidden_size),
            "activations_squared": (num_features,),
        }
        self._sums: _Sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    @torch.no_grad()
    def update(
        self,
        states: Tensor,
        activations: Tensor,
        constant: Tensor,
        reduce: Callable[[_Sums], _Sums] | None = None,
    ) -> None:
        """Takes in a batch. No gradient goes through it.

        Args:
            states (`[B, D]`): as the head reads them; for pairs, chosen less rejected.
            activations (`[B, U]`): of each unintended feature; for pairs likewise.
            constant (`[B, P]`): see `batch_constant`.
            reduce (*optional*): sums a dict of tensors over the processes: `accelerator.reduce`.

        Raises:
            ValueError: a shape doesn't fit.
        """
        widths = (states.shape[-1], activations.shape[-1], constant.shape[-1])
        wanted = (
            self._sums["constant_states"].shape[1],
            len(self._sums["activations_squared"]),
            len(self._sums["constant_constant"]),
        )
        if widths != wanted or not len(states) == len(activations) == len(constant):
            raise ValueError(
                f"states, activations and constant have shapes {tuple(states.shape)}, {tuple(activations.shape)} and "
                f"{tuple(constant.shape)}; their widths must be {wanted}, and the rows as many"
            )
        device = _precise(states.device)
        h, z, k = (values.detach().to(device).double() for values in (states, activations, constant))
        count = torch.tensor(float(len(h)), dtype=torch.float64, device=device)
        batch = {
            "seen": count,
            "count": count,
            "constant_constant": k.T @ k,
            "constant_states": k.T @ h,
            "constant_activations": k.T @ z,
            "activations_states": z.T @ h,
            "activations_squared": z.pow(2).sum(dim=0),
        }
        if reduce is not None:
            batch = reduce(batch)
        before = {name: total.to(device) for name, total in self._sums.items()}
        self._sums = {name: self.momentum * total + batch[name] for name, total in before.items()}
        # All texts, not only those that the sums still remember.
        self._sums["seen"] = before["seen"] + batch["seen"]

    def scale(self, factor: float) -> None:
        """Makes all that was seen so far count `factor` times as much beside what comes."""
        self._sums = {name: total if name == "seen" else total * factor for name, total in self._sums.items()}

    @property
    def directions(self) -> Tensor:
        """`[U, D]`, float32; zeros before `min_texts` were seen, and for features that don't vary within a label."""
        sums = self._sums
        count = sums["count"].clamp_min(1.0)
        # What follows the constant columns, as coefficients on them.
        of_constant = _inverse(sums["constant_constant"]) @ sums["constant_activations"]
        covariance = (sums["activations_states"] - of_constant.T @ sums["constant_states"]) / count
        square = sums["activations_squared"]
        variance = (square - (of_constant * sums["constant_activations"]).sum(dim=0)) / count
        # Rounding leaves a constant column about 1e-16 of its mean square.
        alive = (variance > 1e-12 * square / count) & (sums["seen"] >= self.min_texts)
        spread = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        return torch.where(alive.unsqueeze(1), covariance / spread.unsqueeze(1), 0.0).float()

    def state_dict(self) -> dict[str, Tensor]:
        """What has been seen; with a checkpoint, so that training resumed goes on with it."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: it is of other sizes.
        """
        found = {name: tuple(total.shape) for name, total in state.items()}
        wanted = {name: tuple(total.shape) for name, total in self._sums.items()}
        if found != wanted:
            raise ValueError(f"the running dependence saved has shapes {found}, this one has {wanted}")
        self._sums = {name: state[name].to(total) for name, total in self._sums.items()}


class RunningScale:
    """Root mean square of states about their mean, over all dimensions: the scale of a standardisation, from batches.

    Args:
        momentum: as for [`RunningDependence`].
    """

    def __init__(self, momentum: float = 0.99) -> None:
        self.momentum = momentum
        self._sums: _Sums = {}

    @torch.no_grad()
    def update(self, states: Tensor, reduce: Callable[[_Sums], _Sums] | None = None) -> None:
        """Takes in a batch of states `[B, D]`."""
        h = states.detach().to(_precise(states.device)).double()
        count = torch.tensor(float(len(h)), dtype=torch.float64, device=h.device)
        batch = {"count": count, "states": h.sum(dim=0), "squares": h.pow(2).sum()}
        if reduce is not None:
            batch = reduce(batch)
        before = self._sums or {name: torch.zeros_like(total) for name, total in batch.items()}
        self._sums = {name: self.momentum * before[name].to(total) + total for name, total in batch.items()}

    @property
    def scale(self) -> Tensor:
        """`[]`, float32; 1 before two states that differ were seen."""
        if not self._sums:
            return torch.ones(())
        mean = self._sums["states"] / self._sums["count"]
        mean_square = self._sums["squares"] / self._sums["count"]
        variance = (mean_square - mean.pow(2).sum()) / len(mean)
        differ = variance > 1e-12 * mean_square / len(mean)
        return torch.where(differ, variance.clamp_min(0).sqrt(), 1.0).float()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sums = dict(state)


def batch_constant(task: Task, labels: Tensor, num_labels: int) -> Tensor:
    """`tasks.held_constant` of a batch: the same columns whichever labels the batch has -> `[B, P]`, float64.

    P is `num_labels` for `single_label`, `1 + num_labels` for `multi_label`, 2 for `regression`, 1 for `preference`.
    """
    if task == "single_label":
        return F.one_hot(labels, num_labels).double()
    return held_constant(task, labels).to(labels.device)


def _inverse(gram: Tensor) -> Tensor:
    """Pseudo-inverse of `[P, P]` sums of products, where columns may repeat, or may not have been seen yet."""
    # At unit diagonal first: a target far from 0 in its own unit would look like the column of ones.
    size = gram.diagonal().sqrt()
    scale = torch.where(size > 0, 1 / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
    outer = scale.unsqueeze(1) * scale
    return torch.linalg.pinv(gram * outer, rtol=1e-12, hermitian=True) * outer


def _precise(device: torch.device) -> torch.device:
    """Where to sum: differences of sums of squares need float64, which Apple's devices lack."""
    return torch.device("cpu") if device.type == "mps" else device
