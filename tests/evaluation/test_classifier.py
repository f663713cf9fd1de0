import pytest
import torch

from helpers import make_classifier, make_sae
from selfreg import (
    HiddenStateExtractor,
    RegularizedSequenceClassifier,
    UnintendedFeatures,
    evaluate_classifier,
)


def test_classifiers_are_measured_against_the_same_features(extractor: HiddenStateExtractor, texts: list[str]) -> None:
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    plain = RegularizedSequenceClassifier.from_backbone(extractor, None, None, num_labels=3)
    controlled = make_classifier(extractor, remove_unintended=False)
    plain.load_state_dict(controlled.state_dict() | dict(_rows_of(plain)))
    assert evaluate_classifier(plain, rows)["unintended_use"] is None
    # The same weights on the same states: every figure is the same, once they are measured against the same features.
    figures = evaluate_classifier(plain, rows, unintended=controlled.unintended)
    for name, value in evaluate_classifier(controlled, rows).items():
        assert figures[name] == pytest.approx(value, abs=1e-6), name
    other = UnintendedFeatures.from_ids(make_sae(extractor), [20, 21])
    assert evaluate_classifier(plain, rows, unintended=other)["unintended_use"] != figures["unintended_use"]


def _rows_of(model: RegularizedSequenceClassifier) -> dict[str, torch.Tensor]:
    names = ("encoder_directions", "encoder_bias", "decoder_directions")
    return {name: model.state_dict()[name] for name in names}


def test_number_that_is_an_id_and_another_labels_name_is_refused(
    extractor: HiddenStateExtractor, texts: list[str]
) -> None:
    model = RegularizedSequenceClassifier.from_backbone(extractor, None, None, id2label={0: "1", 1: "2", 2: "3"})
    with pytest.raises(ValueError, match=r"label 1 may be the class id 1 or the label named '1' \(class id 0\)"):
        evaluate_classifier(model, [{"text": text, "label": 1} for text in texts])
    assert evaluate_classifier(model, [{"text": text, "label": "1"} for text in texts])["accuracy"] is not None
    binary = RegularizedSequenceClassifier.from_backbone(extractor, None, None, id2label={0: "0", 1: "1"})
    assert evaluate_classifier(binary, [{"text": text, "label": i % 2} for i, text in enumerate(texts)])


def test_a_stock_model_is_sent_to_the_metrics(texts: list[str]) -> None:
    with pytest.raises(TypeError, match="not a Linear: for a model of transformers take the metrics of selfreg.eval"):
        evaluate_classifier(torch.nn.Linear(2, 2), [{"text": text, "label": 0} for text in texts])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, "there is no column 'text'; the rows have label"),
        ({"text": "a fever", "label": "worse"}, "label 'worse' is none of the classifier's: well, ill, very ill"),
    ],
)
def test_bad_rows_are_named(extractor: HiddenStateExtractor, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_classifier(make_classifier(extractor), [row])
