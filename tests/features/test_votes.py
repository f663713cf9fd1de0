from collections.abc import Sequence

import pytest
from sklearn.metrics import cohen_kappa_score

from selfreg.features.records import FeatureRecord, VerdictName, Vote
from selfreg.features.votes import Settled, _interval, agreement, settle, settled_record, split_votes


def vote(
    judge: str,
    verdict: VerdictName | None,
    probabilities: Sequence[float] = (),
    *,
    label: str | None = None,
    person: bool = False,
    at: str = "",
    reason: str | None = None,
) -> Vote:
    names = ("Yes", "Probably", "Maybe", "No")
    return Vote(judge, verdict, dict(zip(names, probabilities, strict=False)), reason, label, person, at)


class TestSettle:
    def test_nothing_decided(self) -> None:
        assert settle([]) == Settled() == settle([vote("a", None), vote("b", None)])

    def test_one_vote(self) -> None:
        settled = settle([vote("a", "Maybe", (0.1, 0.2, 0.4, 0.3), at="2026-01-01", reason="Because.")])
        assert settled == Settled(
            verdict="Maybe",
            probabilities={"Yes": 0.1, "Probably": 0.2, "Maybe": 0.4, "No": 0.3},
            reason="Because.",
            decided_by="a",
            decided_at="2026-01-01",
        )

    def test_majority(self) -> None:
        votes = [
            vote("a", "No", at="1", reason="Not this."),
            vote("b", "Yes", at="3"),
            vote("c", "Probably", at="2", reason="This."),
            vote("d", None, at="4"),
        ]
        settled = settle(votes)
        assert settled.verdict == "Yes"  # Yes and Probably are as likely as each other
        assert settled.probabilities == pytest.approx({"Yes": 1 / 3, "Probably": 1 / 3, "Maybe": 0.0, "No": 1 / 3})
        assert (settled.reason, settled.decided_by, settled.decided_at) == ("This.", "c, b", "3")
        assert not settled.split

    def test_largest_mean_of_the_winning_side(self) -> None:
        votes = [vote("a", "Yes", (0.4, 0.3, 0.2, 0.1)), vote("b", "Probably", (0.1, 0.7, 0.1, 0.1))]
        assert settle(votes).verdict == "Probably"
        # Of what the winners said only: No has the largest mean here.
        votes = [vote("a", "Yes", (0.4, 0.1, 0.1, 0.4)), vote("b", "Yes", (0.4, 0.1, 0.1, 0.4)), vote("c", "No")]
        assert settle(votes).verdict == "Yes"

    def test_ties_go_to_the_surer(self) -> None:
        assert settle([vote("a", "Probably"), vote("b", "Yes")]).verdict == "Yes"
        assert settle([vote("a", "Maybe"), vote("b", "No")]).verdict == "No"

    def test_even_split(self) -> None:
        settled = settle([vote("a", "Yes", at="1", reason="r"), vote("b", "No", at="2")])
        assert settled.split
        assert (settled.verdict, settled.reason, settled.decided_by, settled.decided_at) == (None, None, None, None)
        assert settled.probabilities == {"Yes": 0.5, "Probably": 0.0, "Maybe": 0.0, "No": 0.5}

    def test_latest_vote_of_a_judge(self) -> None:
        assert settle([vote("a", "No", at="2"), vote("a", "Yes", at="1")]).verdict == "No"
        assert settle([vote("a", "No", at="1"), vote("a", "Yes", at="1")]).verdict == "Yes"
        assert settle([vote("a", "No", at="1"), vote("a", None, at="2"), vote("b", "Yes", at="0")]).verdict == "Yes"
        again = vote("a", "Yes")
        assert settle([again, again, vote("b", "No")]).split  # the same vote twice is one

    def test_person_outranks_models(self) -> None:
        votes = [vote("a", "Yes", at="9"), vote("b", "Yes", at="9"), vote("Ann", "No", person=True, at="1")]
        settled = settle(votes)
        assert (settled.verdict, settled.decided_by, settled.split) == ("No", "Ann", False)
        assert settled.probabilities == {"Yes": 0.0, "Probably": 0.0, "Maybe": 0.0, "No": 1.0}
        assert settle([*votes, vote("Bob", "Probably", person=True, at="2")]).decided_by == "Bob"
        # Ann takes hers back.
        assert settle([*votes, vote("Ann", None, person=True, at="3")]).decided_by == "a, b"

    def test_person_with_the_name_of_a_model(self) -> None:
        assert settle([vote("a", "Yes", at="2"), vote("a", "No", person=True, at="1")]).verdict == "No"

    def test_most_legitimate_label(self) -> None:
        votes = [
            vote("a", "No", label="x", at="1", reason="Not x."),
            vote("a", "Probably", label="y", at="1", reason="It is y."),
            vote("a", "Yes", (0.6, 0.3, 0.1, 0.0), label="z", at="1", reason="It is z."),
        ]
        settled = settle(votes)
        assert settled.verdict == "Yes"
        assert settled.reason == "It is z."
        assert settled.probabilities["Yes"] == 0.6
        assert settled.label_verdicts == {"x": "No", "y": "Probably", "z": "Yes"}

    def test_unintended_only_if_legitimate_for_no_label(self) -> None:
        votes = [vote("a", "No", label="x"), vote("a", "Maybe", label="y")]
        assert settle(votes).verdict == "Maybe"
        still_open = [*votes, vote("a", None, label="z")]
        assert (settle(still_open).verdict, settle(still_open).split) == (None, False)
        assert settle(still_open).label_verdicts == {"x": "No", "y": "Maybe"}
        split = [*votes, vote("b", "Yes", label="y")]
        assert (settle(split).verdict, settle(split).split) == (None, True)
        assert settle(split).label_verdicts == {"x": "No"}
        # One legitimate label is enough for the feature, and the other one is still for a person.
        legitimate = [*split, vote("a", "Yes", label="z")]
        assert (settle(legitimate).verdict, settle(legitimate).split) == ("Yes", True)

    def test_person_per_label_and_overall(self) -> None:
        models = [vote("a", "No", label="x", at="1"), vote("a", "Yes", label="y", at="1")]
        one = settle([*models, vote("Ann", "No", label="y", person=True, at="2")])
        assert (one.verdict, one.label_verdicts) == ("No", {"x": "No", "y": "No"})
        overall = vote("Ann", "No", person=True, at="2")
        assert settle([*models, overall]).label_verdicts == {"x": "No", "y": "No"}
        assert settle([*models, overall]).decided_by == "Ann"
        later = settle([*models, overall, vote("Ann", "Yes", label="x", person=True, at="3")])
        assert (later.verdict, later.label_verdicts) == ("Yes", {"x": "Yes", "y": "No"})
        earlier = settle([*models, overall, vote("Ann", "Yes", label="x", person=True, at="1")])
        assert earlier.label_verdicts == {"x": "No", "y": "No"}

    def test_record(self) -> None:
        record = FeatureRecord(3, density=0.5, votes=[vote("a", "No", at="1", label="x", reason="r")])
        settled = settled_record(record)
        assert (settled.feature, settled.density, settled.votes) == (3, 0.5, record.votes)
        assert (settled.verdict, settled.label_verdicts, settled.reason) == ("No", {"x": "No"}, "r")
        assert (settled.decided_by, settled.decided_at) == ("a", "1")
        assert settled_record(settled_record(record)) == settled
        # What was settled before goes with the votes.
        assert settled_record(FeatureRecord(3, verdict="Yes", decided_by="b", reason="r")) == FeatureRecord(3)


def test_split_votes_most_evenly_split_first() -> None:
    records = [
        FeatureRecord(0, votes=[vote("a", "Yes"), vote("b", "Probably")]),
        FeatureRecord(1, votes=[vote("a", "Yes"), vote("b", "No"), vote("c", "No")]),
        FeatureRecord(2, votes=[vote("a", "Yes", (0.9, 0.1, 0, 0)), vote("b", "Maybe", (0.3, 0.1, 0.6, 0))]),
        FeatureRecord(3, votes=[vote("a", "Yes", (0.5, 0.1, 0.4, 0)), vote("b", "No", (0.1, 0.3, 0, 0.6))]),
        FeatureRecord(4, votes=[vote("a", "Yes"), vote("b", "No"), vote("Ann", "No", person=True)]),
        FeatureRecord(5, votes=[vote("a", "Yes"), vote("b", None)]),
        FeatureRecord(6, votes=[vote("a", "No", label="x"), vote("a", "Yes", label="y"), vote("b", "No", label="y")]),
        FeatureRecord(7),
    ]
    assert [record.feature for record in split_votes(records)] == [3, 6, 2, 1]


class TestAgreement:
    def test_equals_scikit_learn(self) -> None:
        ours: list[VerdictName] = ["Yes", "Yes", "No", "Maybe", "Probably", "No"] * 2
        theirs: list[VerdictName] = ["Probably", "No", "No", "No", "Yes", "Yes"] * 2
        records = [
            FeatureRecord(i, votes=[vote("a", a), vote("Ann", b, person=True)])
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        ]
        (found,) = agreement([*records, FeatureRecord(99, votes=[vote("a", "Yes"), vote("Ann", None, person=True)])])
        assert (found.first, found.second, found.features) == ("a", "Ann", 12)
        assert found.kappa == pytest.approx(cohen_kappa_score([1, 1, 0, 0, 1, 0] * 2, [1, 0, 0, 0, 1, 1] * 2))
        assert found.observed == pytest.approx(4 / 6)
        assert found.low is not None
        assert found.high is not None
        assert -1 <= found.low < found.kappa < found.high <= 1
        assert agreement(records) == agreement(records)

    def test_undefined(self) -> None:
        records = [FeatureRecord(i, votes=[vote("a", "Yes"), vote("b", "Probably")]) for i in range(4)]
        (found,) = agreement(records)
        assert (found.kappa, found.low, found.high, found.observed) == (None, None, None, 1.0)

    def test_no_interval_of_few_or_of_judges_that_never_differ(self) -> None:
        def pairs(count: int, second: VerdictName | None) -> list[FeatureRecord]:
            verdicts: list[VerdictName] = ["Yes" if i % 2 else "No" for i in range(count)]
            return [
                FeatureRecord(i, votes=[vote("a", verdict), vote("b", second or verdict)])
                for i, verdict in enumerate(verdicts)
            ]

        for records, kappa in ((pairs(9, None), 1.0), (pairs(40, None), 1.0), (pairs(40, "Yes"), 0.0)):
            (found,) = agreement(records)
            assert (found.kappa, found.low, found.high) == (kappa, None, None)

    def test_one_question(self) -> None:
        (found,) = agreement([FeatureRecord(0, votes=[vote("a", "Yes"), vote("b", "No")])])
        assert (found.features, found.kappa, found.low, found.high, found.observed) == (1, 0.0, None, None, 0.0)

    def test_every_pair_and_none_without_common_features(self) -> None:
        records = [
            FeatureRecord(0, votes=[vote("a", "Yes"), vote("b", "No"), vote("c", "No")]),
            FeatureRecord(1, votes=[vote("d", "No")]),
        ]
        pairs = [(found.first, found.second) for found in agreement(records)]
        assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]

    def test_per_label(self) -> None:
        votes = [vote(judge, verdict, label=label) for judge, label, verdict in PER_LABEL]
        records = [FeatureRecord(0, votes=votes), FeatureRecord(1, votes=[vote("a", "No"), vote("b", "No")])]
        (found,) = agreement(records)
        assert found.features == 3  # x and y of the first, the second as a whole
        assert found.kappa == pytest.approx(cohen_kappa_score([1, 0, 0], [1, 1, 0]))
        # A judge of the whole is held against what the labels come to.
        records = [FeatureRecord(0, votes=[*votes[:2], vote("Ann", "Probably", person=True)])]
        (found,) = agreement(records)
        assert (found.features, found.observed) == (1, 1.0)


PER_LABEL: list[tuple[str, str, VerdictName]] = [
    ("a", "x", "Yes"),
    ("a", "y", "No"),
    ("b", "x", "Yes"),
    ("b", "y", "Maybe"),
    ("b", "y", "Yes"),
    ("b", "z", "No"),
]


def test_bootstrap_of_the_closed_form() -> None:
    # Two features of opposite kinds: a resample is of both (kappa 1) or of one alone (undefined).
    assert _interval([[(True, True)], [(False, False)]], seed=0) == (None, None)
    low, high = _interval([[(True, True)], [(False, False)], [(True, False)], [(False, True)]] * 50, seed=0)
    assert low is not None
    assert high is not None
    assert low == pytest.approx(-0.14, abs=0.03)  # the standard error of a kappa of 0 over 200 is about 0.07
    assert high == pytest.approx(0.14, abs=0.03)
