"""FeatureCatalog: what each feature of an SAE reacts to, with evidence."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from huggingface_hub import CommitInfo

from selfreg.activations.dealing import own_shards
from selfreg.activations.extractor import HiddenStateExtractor
from selfreg.activations.prompt import check_texts
from selfreg.activations.spec import HiddenStateSpec
from selfreg.activations.store import ActivationStore
from selfreg.features.card import write_card
from selfreg.features.chat import ChatModel
from selfreg.features.collect import Evidence
from selfreg.features.decisions import (
    DecisionLog,
    check_features,
    check_verdict,
    read_csv,
    with_vote,
    write_csv,
)
from selfreg.features.evidence import build_records
from selfreg.features.records import FeatureRecord, Vote, now
from selfreg.features.rubric import Rubric
from selfreg.features.selection import UnintendedFeatures
from selfreg.features.table import from_table, to_table
from selfreg.features.votes import Agreement, agreement, split_votes
from selfreg.sae.fingerprint import sae_fingerprint
from selfreg.sae.modeling import SAEForFeatureExtraction
from selfreg.utils.files import atomic_path, fingerprint_json, fingerprint_strings, read_json, write_json
from selfreg.utils.hub import local_folder, push
from selfreg.utils.processes import processes
from selfreg.utils.progress import progress

TABLE_NAME = "features.parquet"
CONFIG_NAME = "catalog.json"
FORMAT_VERSION = 2

_OWNER = b"selfreg.catalog"


class FeatureCatalog:
    """The records of all features of an SAE, built from a set of texts.

    Args:
        records: one a feature, in order.
        spec: the hidden states that the SAE was trained on.
        info: what the catalogue was made from.
        sae: the SAE itself, where it is at hand; it is not saved with the catalogue.
    """

    def __init__(
        self,
        records: list[FeatureRecord],
        spec: HiddenStateSpec,
        info: dict[str, Any],
        sae: SAEForFeatureExtraction | None = None,
    ) -> None:
        self.records = records
        self.spec = spec
        self.info = info
        self.sae = sae

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, feature: int) -> FeatureRecord:
        return self.records[feature]

    def __iter__(self) -> Iterator[FeatureRecord]:
        return iter(self.records)

    def __repr__(self) -> str:
        alive, explained, judged = (
            sum(map(test, self.records))
            for test in (
                lambda record: bool(record.spans),
                lambda record: record.explained,
                lambda record: record.verdict is not None,
            )
        )
        return (
            f"FeatureCatalog({len(self)} features of layer {self.spec.layer} of {self.spec.model!r}: {alive} active "
            f"in {self.info.get('num_texts', 0):,} texts, {explained} explained, {judged} judged)"
        )

    @classmethod
    def build(
        cls,
        sae: SAEForFeatureExtraction,
        extractor: HiddenStateExtractor,
        texts: Sequence[str],
        *,
        top_k: int = 10,
        store: ActivationStore | None = None,
        labels: Sequence[Any] | None = None,
        groups: Sequence[Any] | None = None,
    ) -> "FeatureCatalog":
        """One streaming pass over texts; never more than a few peaks a feature are held.

        Under `accelerate launch` or `torchrun` every process has to call it, with the same texts. Each then goes over
        some of the shards, and all get the catalogue that one process would have built.

        Args:
            sae: the SAE.
            extractor: of the backbone and layer that the SAE was trained on.
            texts: the texts; the same text counts once.
            top_k: texts that are kept for each feature as its strongest.
            store: the hidden states of these very texts, if they are on disk already.
            labels, groups: one a text, None where it is not known; in what share of each a feature is active is then
                kept.

        Raises:
            ValueError: the SAE and the extractor do not fit, the store is of other texts or states, or there are not
                as many labels or groups as texts.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        texts = list(texts)
        check_texts(texts)
        for name, values in {"labels": labels, "groups": groups}.items():
            if values is not None and len(values) != len(texts):
                raise ValueError(f"there are {len(values)} {name} for {len(texts)} texts: give one a text")
        spec = sae.config.hidden_state_spec()
        if spec is not None:
            spec.check_features_fit(extractor.spec, "the SAE", "the extractor")
        fingerprint = fingerprint_strings(texts)
        if store is not None:
            if store.text_fingerprint != fingerprint:
                raise ValueError(f"the store {store.path} was made from other texts: pass its own texts, or no store")
            # The spans are cut by the extractor, so that the template and the length count too.
            store.spec.check_same(extractor.spec, f"the store {store.path}", "the extractor")
        first_of: dict[str, int] = {}
        is_first = torch.tensor([first_of.setdefault(text, i) == i for i, text in enumerate(texts)])
        mean_tokens = store.num_tokens / len(texts) if store is not None else float(extractor.spec.max_length)
        evidence = Evidence(
            sae.config.num_features, is_first, top_k=top_k, mean_tokens=mean_tokens, labels=labels, groups=groups
        )
        if store is None:
            for _, shard in own_shards(extractor, texts, "catalogue"):
                evidence.update(sae, shard)
        else:
            state = processes()
            own = slice(state.process_index, None, state.num_processes)
            with progress("catalogue", len(texts) // state.num_processes, "texts") as advance:
                for shard in store.shards(own):
                    evidence.update(sae, shard)
                    advance(shard.end_text - shard.first_text)
        evidence.finish()
        records = build_records(evidence, sae.decoder_directions.detach(), extractor, texts)
        info = {
            "text_fingerprint": fingerprint,
            "num_texts": len(texts),
            "num_tokens": evidence.num_tokens,
            "top_k": top_k,
            "sae_fingerprint": sae_fingerprint(sae),
        }
        return cls(records, extractor.spec, info, sae)

    def check_sae(self, sae: SAEForFeatureExtraction) -> None:
        """Raises ValueError where the catalogue is of another SAE."""
        if self.info["sae_fingerprint"] != sae_fingerprint(sae):
            raise ValueError("the catalogue was built from another SAE: build it again with this one")

    def explain(
        self,
        chat: ChatModel,
        *,
        features: Sequence[int] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Asks a chat model for a phrase for each feature that has spans, and whether the phrase describes them.

        Where a feature gets another phrase than it had, its scores and the votes of models go: they were on the old
        one.

        Args:
            chat: the explainer.
            features: which features; all that have spans if None.
            cache: a file that every answer is appended to at once, so that a later call asks only what is missing.
        """
        from selfreg.features.answers import explain_catalog

        explain_catalog(self, chat, features, cache)

    def score(
        self,
        chat: ChatModel | None = None,
        *,
        features: Sequence[int] | None = None,
        cache: str | os.PathLike[str] | None = None,
        max_examples: int = 5,
    ) -> None:
        """Scores explanations by what they predict, on texts that the explainer was not shown.

        Args:
            chat: answers from the explanation alone which texts activate the feature (detection) and which of their
                words does (fuzzing), `4 * max_examples` short questions a feature. None: only the score that needs no
                chat model, a linear probe on the words of the explanation.
            features: which features; all that have an explanation if None.
            cache: as for `explain`.
            max_examples: texts of each kind, activating and silent.

        Raises:
            ValueError: nothing is explained yet.
        """
        from selfreg.features.answers import score_catalog

        score_catalog(self, chat, features, cache, max_examples)

    def judge(
        self,
        chat: ChatModel | Sequence[ChatModel],
        rubric: Rubric | str | os.PathLike[str],
        *,
        features: Sequence[int] | None = None,
        cache: str | os.PathLike[str] | None = None,
        reasons: bool = True,
    ) -> None:
        """Asks chat models, for each explained feature, whether it is a legitimate reason for a label, and why.

        Every judge has a vote. On the features that are judged anew, a judge's old votes go, and so do those of all
        models that judged by another rubric; see `settle` for what votes come to. A person's vote (`decide`) outranks
        all of them.

        Args:
            chat: the judge, or several that vote.
            rubric: what is a legitimate reason; see `Rubric.load`: a shipped one by name, a file, or a text.
            features: which features; all that are explained if None.
            cache: as for `explain`.
            reasons: ask for a sentence that says why; about twice the calls.
        """
        from selfreg.features.answers import judge_catalog

        chats = list(chat) if isinstance(chat, Sequence) else [chat]
        judge_catalog(self, chats, Rubric.load(rubric), features, cache, reasons)

    def decide(
        self, feature: int, verdict: str, *, by: str, label: str | None = None, reason: str | None = None
    ) -> None:
        """A person's verdict on a feature. It outranks those of models; the same person's earlier one goes.

        Args:
            feature: its number.
            verdict: Yes, Probably, Maybe or No: is it a legitimate reason?
            by: who decides.
            label: for which label; None: for all.
            reason: a sentence.

        Raises:
            ValueError: there is no such feature or verdict, or `by` is empty.
        """
        check_features([feature], len(self), "decide")
        if not by.strip():
            raise ValueError("by is empty: a verdict needs somebody's name")
        vote = Vote(by, check_verdict(verdict), reason=reason, label=label, person=True, at=now())
        self.records[feature] = with_vote(self.records[feature], vote)

    def split_votes(self) -> list[FeatureRecord]:
        """The features that judges disagree on and no person has decided, the most evenly split first."""
        return split_votes(self.records)

    def agreement(self) -> list[Agreement]:
        """Cohen's kappa of every two judges, models and persons, on what is legitimate."""
        return agreement(self.records)

    def to_csv(self, path: str | os.PathLike[str]) -> int:
        """Writes features with spans as a spreadsheet, with columns for a person's verdicts; gives how many."""
        return write_csv(self.records, path)

    def read_csv(self, path: str | os.PathLike[str], *, by: str) -> int:
        """Takes a person's verdicts from a file that `to_csv` wrote; gives how many.

        Raises:
            ValueError: a verdict or feature of the file is not known; names the line, and nothing is taken.
        """
        found = read_csv(path, len(self))
        for feature, (verdict, reason) in found.items():
            self.decide(feature, verdict, by=by, reason=reason)
        return len(found)

    def unintended(
        self, sae: SAEForFeatureExtraction | None = None, *, max_features: int | None = None
    ) -> UnintendedFeatures:
        """The features that are explained, or decided by a person, and whose verdict is neither Yes nor Probably.

        Where features were judged for each label, one that is a reason for some labels is unintended for the others,
        and says so in `UnintendedFeatures.labels`.

        Args:
            sae: the SAE of this catalogue, which holds the directions; not needed in the session that built it.
            max_features: how many at most, the least legitimate first.

        Raises:
            ValueError: nothing has been judged yet, or the SAE is another one, or there is none.
        """
        sae = sae or self.sae
        if sae is None:
            raise ValueError("a catalogue read from disk holds no SAE: pass its own, catalog.unintended(sae)")
        self.check_sae(sae)
        judged = [record for record in self.records if record.judged or record.unintended_for is not None]
        if not judged:
            raise ValueError("no feature has a verdict yet: call explain and judge first")
        every = {label for record in judged for label in record.label_verdicts}
        # For all labels (None) unless it was judged label by label and is a reason for some.
        of_labels: dict[int, list[str] | None] = {}
        for record in judged:
            own = record.unintended_for
            if own is None and not record.legitimate:
                of_labels[record.feature] = None
            elif own:
                of_labels[record.feature] = None if set(own) == every else own
        chosen = [record for record in judged if record.feature in of_labels]
        # Before those that are a reason for something, those that are for nothing.
        chosen.sort(key=lambda r: (r.legitimate, -r.verdict_probabilities.get("No", 0.0), r.feature))
        ids = [record.feature for record in chosen[:max_features]]
        labels = [of_labels[feature] for feature in ids]
        reasons = [_verdict_reason(record, of_labels[record.feature]) for record in chosen[:max_features]]
        per_label = any(own is not None for own in labels)
        return UnintendedFeatures.from_ids(sae, ids, reasons=reasons, labels=labels if per_label else None)

    def update(self, feature: int, **changes: Any) -> None:
        """Replaces fields of one record."""
        self.records[feature] = replace(self.records[feature], **changes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload feature catalogue",
        commit_description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Uploads the catalogue as a data set, which the Hub's viewer shows and `datasets.load_dataset` reads.

        It holds pieces of the texts that it was built from: where those may not be published, `private=True`.

        Args:
            repo_id, private, token, commit_message, commit_description, revision, create_pr: as for `push_to_hub` of
                transformers.

        Returns:
            The commit; its `oid` is what `revision=` of `from_pretrained` takes.

        Raises:
            OSError: no token, no permission, or no way to the Hub; says which.
        """
        return push(
            self.save_pretrained,
            repo_id,
            repo_type="dataset",
            private=private,
            token=token,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes a folder that is a data set: `features.parquet`, one row a feature, `catalog.json` and a README.md.

        Each file is whole or not there. A README.md that somebody else wrote stays as it is.
        """
        folder = Path(save_directory)
        config = {"format_version": FORMAT_VERSION, "spec": self.spec.to_dict(), **self.info}
        # The table says what it belongs to, so that one of another catalogue beside an old catalog.json is found out.
        table = to_table(self.records).replace_schema_metadata({_OWNER: fingerprint_json(config)})
        with atomic_path(folder / TABLE_NAME) as path:
            pq.write_table(table, path)
        write_json(folder / CONFIG_NAME, config)
        write_card(folder, self)

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike[str], **hub: Any) -> "FeatureCatalog":
        """Reads a folder that `save_pretrained` wrote, or a data set that `push_to_hub` uploaded.

        What a person decided in `selfreg features review` is taken from the folder's `decisions.jsonl`.

        Args:
            save_directory: the folder, or the Hub id of a data set.
            hub: `subfolder`, and of the data set on the Hub `revision`, `token`, `cache_dir` and `local_files_only`,
                as in transformers.

        Raises:
            FileNotFoundError: it is no catalogue.
            OSError: there is no such data set or revision, no permission, or no way to the Hub; says which.
            ValueError: it is not whole, of another format, or holds decisions on another SAE's features.
        """
        folder = local_folder(str(save_directory), (CONFIG_NAME, TABLE_NAME), repo_type="dataset", **hub)
        for name in (CONFIG_NAME, TABLE_NAME):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a feature catalogue")
        info = read_json(folder / CONFIG_NAME)
        table = pq.read_table(folder / TABLE_NAME)
        if (table.schema.metadata or {}).get(_OWNER, b"").decode() != fingerprint_json(info):
            raise ValueError(
                f"{TABLE_NAME} and {CONFIG_NAME} in {folder} are of two catalogues: saving was cut short, save again"
            )
        version = info.pop("format_version")
        if version != FORMAT_VERSION:
            mend = "upgrade selfreg" if version > FORMAT_VERSION else "build it again"
            raise ValueError(
                f"{folder} is a catalogue of format {version}, this selfreg reads {FORMAT_VERSION}: {mend}"
            )
        spec = HiddenStateSpec.from_dict(info.pop("spec"))
        records = from_table(table)
        DecisionLog(folder, info["sae_fingerprint"]).apply(records)
        return cls(records, spec, info)


def _verdict_reason(record: FeatureRecord, labels: list[str] | None) -> str:
    if labels is None:
        return f"judged {record.verdict or 'No'} by {record.decided_by or 'all'}: {record.why}"
    return f"judged no reason for {', '.join(labels)}: {record.why}"
