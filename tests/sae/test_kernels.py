from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfreg import SAEConfig, SAEForFeatureExtraction
from selfreg.sae import kernels
from selfreg.sae.kernels import (
    gather_sum,
    sampled_dot,
    select_topk,
    sparse_autoencode,
    sparse_decode,
    sparse_encode,
    topk,
)


def _inputs(states: int = 7, hidden: int = 6, features: int = 12) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((states, hidden), (features, hidden), (features,), (hidden,), (features, hidden))
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]


def _reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, W_dec: Tensor, k: int) -> Tensor:
    pre = (x - b_pre) @ W_enc.T + b_enc
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu()) @ W_dec


@pytest.mark.parametrize("rectify", [True, False])
def test_gradients_against_finite_differences(rectify: bool) -> None:
    def run(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, W_dec: Tensor) -> Tensor:
        values, indices = sparse_encode(x, W_enc, b_enc, b_pre, 3, rectify=rectify)
        return sparse_decode(values, indices, W_dec)

    assert torch.autograd.gradcheck(run, _inputs())


@pytest.mark.parametrize("k", [1, 3, 12])
def test_equals_the_dense_reference_with_gradients(k: int) -> None:
    fast, dense = _inputs(), _inputs()
    values, indices = sparse_encode(*fast[:4], k)
    out = sparse_decode(values, indices, fast[4])
    wanted = _reference(*dense, k)
    torch.testing.assert_close(out, wanted)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip(fast, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), features=st.sampled_from([8, 60, 64, 97, 384, 576, 1000]), data=st.data())
def test_two_level_topk_is_exact(rows: int, features: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(features, 32)))
    pre = torch.randn(rows, features, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    values, indices = topk(pre, k)
    assert torch.equal(values.sort(dim=1, descending=True).values, pre.topk(k, dim=1).values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_two_level_topk_is_taken_where_it_pays() -> None:
    assert kernels._group_count(4608, 32) == 384
    assert kernels._group_count(4603, 32) == 0


def test_chunks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b, *_ = (tensor.detach() for tensor in _inputs(states=50, features=24))
    whole = select_topk(x, W, b, 4, keep_maxima=True)
    monkeypatch.setattr(kernels, "_CHUNK_ELEMENTS", 24 * 7)
    parts = select_topk(x, W, b, 4, keep_maxima=True)
    for a, c in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, c)
    torch.testing.assert_close(whole[2], (x @ W.T + b).amax(dim=0))


def test_buffer_made_in_inference_mode_can_be_trained_with() -> None:
    kernels._local.__dict__.pop("buffers", None)
    inputs = [tensor.detach().float() for tensor in _inputs()]
    with torch.inference_mode():
        sparse_encode(*inputs[:4], 3)
    leaf = inputs[1].clone().requires_grad_()
    sparse_encode(inputs[0], leaf, *inputs[2:4], 3)[0].sum().backward()
    assert leaf.grad is not None


def test_small_products_by_hand() -> None:
    a, W = torch.randn(5, 4), torch.randn(9, 4)
    indices = torch.randint(0, 9, (5, 3))
    values = torch.randn(5, 3)
    torch.testing.assert_close(sampled_dot(a, W, indices), torch.einsum("nd,nkd->nk", a, W[indices]))
    torch.testing.assert_close(gather_sum(values, indices, W), torch.einsum("nk,nkd->nd", values, W[indices]))


def test_both_in_one_is_encoding_and_decoding_with_gradients() -> None:
    def run(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_autoencode(x, W_enc, b_enc, W_dec, b_dec, 3)[:2]

    assert torch.autograd.gradcheck(run, _inputs())
    fast, dense = _inputs(), _inputs()
    out, values, indices = sparse_autoencode(fast[0], fast[1], fast[2], fast[4], fast[3], 3)
    wanted = _reference(*dense, 3) + dense[3]
    torch.testing.assert_close(out, wanted)
    # Gradients that come through the activations alone, as an L0 or L1 term would send them.
    values.sum().backward()
    dense_values = (dense[0] - dense[3]) @ dense[1].T + dense[2]
    dense_values.gather(1, indices).relu().sum().backward()
    for name, a, b in zip(("x", "W_enc", "b_enc", "b_dec"), fast[:4], dense[:4], strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert fast[4].grad is None


def test_tied_weights_get_both_gradients() -> None:
    x, W, b, b_dec, _ = _inputs()
    dense = [tensor.detach().clone().requires_grad_() for tensor in (x, W, b, b_dec)]
    sparse_autoencode(x, W, b, W, b_dec, 3)[0].pow(2).sum().backward()
    (_reference(*dense, dense[1], 3) + dense[3]).pow(2).sum().backward()
    for a, c in zip((x, W, b, b_dec), dense, strict=True):
        torch.testing.assert_close(a.grad, c.grad)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_a_step_never_holds_all_pre_activations(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states, features, width = 256, 2048, 8
    monkeypatch.setattr(kernels, "_CHUNK_ELEMENTS", 32 * features)
    sae = SAEForFeatureExtraction(SAEConfig(hidden_size=width, num_features=features, k=4, activation=activation))
    x = torch.randn(states, width)
    sae.set_normalization(x.mean(dim=0), x.std())
    sae.start_from(x, 4)
    sae.train()
    with _Largest() as largest:
        output = sae(x)
        sae.count_fired(output.features)
        output.loss.backward()
        sae.project_decoder_gradient()
        sae.normalize_decoder()
        sae.eval().encode(x)
    # A chunk, and nothing of the size of the batch's pre-activations.
    assert 32 * features <= largest.numel < states * features / 2
