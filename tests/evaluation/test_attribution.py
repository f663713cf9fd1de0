from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreg.evaluation.attribution import explain_logit, feature_contributions, top_contributions


def case(seed: int = 0, num_features: int = 7) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "pooled": 100 * rng.standard_normal((5, 6)),
        "activations": np.maximum(rng.standard_normal((5, num_features)), 0),
        "weight": rng.standard_normal((3, 6)),
        "bias": rng.standard_normal(3),
        "decoder_directions": rng.standard_normal((num_features, 6)),
        "decoder_bias": rng.standard_normal(6),
    }


def test_contributions_by_hand() -> None:
    contributions = feature_contributions(
        pooled_activations=[[2.0, 0.0, 1.0]],
        weight=[[1.0, 2.0], [0.0, -1.0]],
        decoder_directions=[[1.0, 0.0], [5.0, 5.0], [1.0, 1.0]],
    )
    np.testing.assert_array_equal(contributions, [[[2.0, 0.0, 3.0], [0.0, 0.0, -1.0]]])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_features=st.integers(0, 9))
def test_the_parts_sum_to_the_logit(seed: int, num_features: int) -> None:
    arrays = case(seed, num_features)
    explanation = explain_logit(**arrays)
    logits = arrays["pooled"] @ arrays["weight"].T + arrays["bias"]
    assert explanation.features.shape == (5, 3, num_features)
    parts = explanation.features.sum(axis=2) + explanation.bias + explanation.residual
    np.testing.assert_allclose(parts, logits, rtol=0, atol=1e-9)
    np.testing.assert_allclose(explanation.logits, logits, rtol=0, atol=1e-9)


def test_each_part_is_what_it_says() -> None:
    arrays = case()
    weight, directions = arrays["weight"], arrays["decoder_directions"]
    explanation = explain_logit(**arrays)
    # Removing a feature's own write from the state lowers the logit by its contribution, and nothing else.
    without = arrays["pooled"] - np.outer(arrays["activations"][:, 2], directions[2])
    np.testing.assert_allclose((arrays["pooled"] - without) @ weight.T, explanation.features[:, :, 2], atol=1e-12)
    np.testing.assert_allclose(explanation.bias, weight @ arrays["decoder_bias"] + arrays["bias"])
    # A state that the SAE reconstructs exactly leaves no residual.
    arrays["pooled"] = arrays["activations"] @ directions + arrays["decoder_bias"]
    np.testing.assert_allclose(explain_logit(**arrays).residual, 0, atol=1e-12)
    assert np.abs(explanation.residual).min() > 1e-3


def test_a_part_of_the_dictionary_moves_the_rest_to_the_residual() -> None:
    arrays = case()
    whole = explain_logit(**arrays)
    kept = [0, 3]
    part = explain_logit(
        **{
            **arrays,
            "activations": arrays["activations"][:, kept],
            "decoder_directions": arrays["decoder_directions"][kept],
        }
    )
    np.testing.assert_allclose(part.features, whole.features[:, :, kept])
    dropped = np.delete(whole.features, kept, axis=2).sum(axis=2)
    np.testing.assert_allclose(part.residual, whole.residual + dropped, atol=1e-9)
    np.testing.assert_allclose(part.bias, whole.bias)


def test_a_standardised_head_folds_into_raw_space() -> None:
    """The recipe of the module's docstring."""
    arrays = case()
    mean, scale = np.arange(6.0), 4.0
    logits = (arrays["pooled"] - mean) / scale @ arrays["weight"].T + arrays["bias"]
    folded = {
        **arrays,
        "weight": arrays["weight"] / scale,
        "bias": arrays["bias"] - arrays["weight"] @ mean / scale,
    }
    np.testing.assert_allclose(explain_logit(**folded).logits, logits, rtol=0, atol=1e-9)


def test_biases_may_be_left_out() -> None:
    arrays = case()
    without = explain_logit(**{**arrays, "bias": None, "decoder_bias": None})
    np.testing.assert_array_equal(without.bias, np.zeros(3))
    np.testing.assert_allclose(without.logits, arrays["pooled"] @ arrays["weight"].T, rtol=0, atol=1e-9)


def test_top_contributions_sorts_by_size() -> None:
    contributions = [0.5, -2.0, 0.0, 1.0, -1.0]
    top = top_contributions(contributions)
    assert top == [(1, -2.0), (3, 1.0), (4, -1.0), (0, 0.5)]
    assert all(type(feature) is int and type(value) is float for feature, value in top)
    assert top_contributions(contributions, [70, 71, 72, 73, 74], k=2) == [(71, -2.0), (73, 1.0)]
    assert top_contributions(contributions, k=0) == []
    assert top_contributions([]) == []


def test_top_contributions_of_one_text() -> None:
    arrays = case()
    features = explain_logit(**arrays).features
    (first, value), *_ = top_contributions(features[1, 2])
    assert value == features[1, 2, first]
    assert abs(value) == np.abs(features[1, 2]).max()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pooled", np.zeros((5, 5)), "pooled must have 6 columns"),
        ("pooled", np.full((5, 6), np.nan), "pooled holds NaN"),
        ("activations", np.zeros((4, 7)), "activations must have 5 rows"),
        ("weight", np.zeros(6), "weight must have two dimensions"),
        ("decoder_directions", np.zeros((6, 6)), "decoder_directions must have 7 rows"),
        ("decoder_directions", np.zeros((7, 5)), "decoder_directions must have 6 columns"),
        ("bias", np.zeros(4), "bias must have 3 columns"),
        ("bias", 1.0, "bias must have one dimension"),
        ("decoder_bias", np.zeros(5), "decoder_bias must have 6 columns"),
    ],
)
def test_errors_name_the_argument(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain_logit(**{**case(), name: value})


def test_top_contributions_errors() -> None:
    with pytest.raises(ValueError, match="feature_ids must have 2 entries"):
        top_contributions([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="contributions must have 1 rows"):
        top_contributions(np.ones((2, 3)))
    with pytest.raises(ValueError, match="k must be 0 or more"):
        top_contributions([1.0], k=-1)
