"""What is computed once and kept: hidden states, the SAE, activations of all its features, the catalogue's choices.

Every file is named after what it was made from, so that a second call finds it and a changed input does not.

Shapes: N texts (of pairs: sides, the chosen one first), F features of the SAE, D hidden size.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks.controllability.datasets import read
from benchmarks.controllability.pool import Corpus, Pool, generator
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from selfreg import (
    ActivationStore,
    FeatureCatalog,
    HiddenStateExtractor,
    LocalChatModel,
    SAEConfig,
    SAEForFeatureExtraction,
    SAETrainer,
    SAETrainingArguments,
    UnintendedFeatures,
)
from selfreg.activations.conversation import CHAT, render_pair
from selfreg.activations.store import StoreShard, save_tensors
from selfreg.activations.writer import StoreWriter
from selfreg.classifier.penalty import feature_activations
from selfreg.demo.recipe import demo_backbone
from selfreg.features.activations import largest_activations
from selfreg.features.limits import MAX_FEATURES
from selfreg.sae.fingerprint import sae_fingerprint
from selfreg.sae.statistics import evaluate_sae
from selfreg.utils.files import atomic_folder, fingerprint_json, fingerprint_strings, read_json, write_json

LAYER = 15
NUM_FEATURES, K = 4_608, 32
_CHUNK = 4_096


@dataclass(frozen=True)
class Activations:
    """Of every text of a corpus.

    Attributes:
        pooled (`[N, D]`): mean hidden state, nothing removed.
        means, maxima (`[N, F]`): mean and largest ReLU pre-activation of each feature over the tokens.
        largest (`[N, F]`): largest activation behind the SAE's TopK: what features are chosen by.
        topk_means (`[N, F]`): mean activation behind the TopK, for the ablation of the removal.
        last (`[N, D]`), at_last (`[N, F]`): state of the last token and ReLU pre-activations there, for that of the
            pooling.
    """

    pooled: Tensor
    means: Tensor
    maxima: Tensor
    largest: Tensor
    topk_means: Tensor
    last: Tensor
    at_last: Tensor


class Workshop:
    """Makes and keeps everything under one folder.

    Args:
        folder: where.
        sae_tokens: tokens that the SAE is trained on, about.
        sae_epochs: passes over them.
        dtype: of the backbone: bfloat16 is much faster than float32 on a CPU with AMX, and far slower on others.
    """

    def __init__(
        self, folder: Path, *, sae_tokens: int = 250_000, sae_epochs: float = 3, dtype: str = "float32"
    ) -> None:
        self.folder = folder
        self.sae_tokens, self.sae_epochs = sae_tokens, sae_epochs
        self.dtype = dtype

    @cached_property
    def _base(self) -> HiddenStateExtractor:
        return HiddenStateExtractor.from_pretrained(demo_backbone(), layer=LAYER, dtype=getattr(torch, self.dtype))

    @cached_property
    def chat(self) -> LocalChatModel:
        """The whole backbone with its own head, for prompting."""
        return LocalChatModel(demo_backbone(), batch_size=16)

    def extractor(self, corpus: Corpus) -> HiddenStateExtractor:
        """The one backbone, set up for a corpus."""
        base = self._base
        around = 0
        if corpus.template not in (None, CHAT):
            around = len(base.tokenizer(corpus.template.replace("{text}", ""))["input_ids"])
        return HiddenStateExtractor(
            base.backbone,
            base.tokenizer,
            layer=LAYER,
            max_length=corpus.max_length + around,
            template=corpus.template,
            name=base.spec.model,
            revision=base.spec.revision,
            gguf_file=base.spec.gguf_file,
        )

    def prompts(self, corpus: Corpus, rows: Sequence[int] | None = None) -> list[str]:
        """What the backbone reads; of pairs both sides in turn."""
        texts = corpus.texts if rows is None else [corpus.texts[row] for row in rows]
        if corpus.template != CHAT:
            return texts
        tokenizer = self._base.tokenizer
        return [side for text in texts for side in render_pair(tokenizer, json.loads(text), corpus.template)]

    def store(self, corpus: Corpus) -> ActivationStore:
        """Hidden states of all tokens."""
        key = fingerprint_json([corpus.fingerprint, LAYER, self.dtype])
        folder = self.folder / "activations" / f"{corpus.name}-{key[:12]}"
        if not (folder / "whole").exists():
            self.extractor(corpus).extract(self.prompts(corpus), folder)
            (folder / "whole").touch()
        return ActivationStore(folder)

    def sae(self, pools: Sequence[Pool]) -> SAEForFeatureExtraction:
        """One SAE for all data sets, trained on unlabelled texts of their training pools and on general text.

        They are read to 128 tokens, without a question in front, whatever a corpus is read to.
        """
        corpora: dict[str, tuple[Corpus, set[int]]] = {}
        for pool in pools:
            corpora.setdefault(pool.corpus.name, (pool.corpus, set()))[1].update(pool.pool)
        parts = [(name, fingerprint_strings(corpus.texts), sorted(rows)) for name, (corpus, rows) in corpora.items()]
        key = fingerprint_json([parts, self.sae_tokens, self.sae_epochs, NUM_FEATURES, K, LAYER, self.dtype])
        folder = self.folder / f"sae-{key[:12]}"
        if not folder.exists():
            general = [row["text"] for row in read("sae_text", "train")]
            texts = self._mixture([*corpora.values()], general)
            store = self.extractor(Corpus("sae", texts)).extract(
                texts, self.folder / "activations" / f"sae-{key[:12]}"
            )
            held_out = [row["text"] for row in read("sae_text", "test")][:100]
            test = self.extractor(Corpus("sae", held_out)).extract(
                held_out, self.folder / "activations" / f"sae-test-{key[:12]}"
            )
            sae, figures = self._train(store, test)
            with atomic_folder(folder) as temporary:
                sae.save_pretrained(temporary)
                write_json(temporary / "figures.json", {**figures, "tokens": store.num_tokens})
        return SAEForFeatureExtraction.from_pretrained(folder)

    def _mixture(self, corpora: list[tuple[Corpus, set[int]]], general: list[str]) -> list[str]:
        """About as many tokens of every corpus, and of general text."""
        extractor = self.extractor(Corpus("sae", ["…"]))
        each = self.sae_tokens // (len(corpora) + 1)
        texts: list[str] = []
        for corpus, rows in [*corpora, (Corpus("general", general), set(range(min(len(general), 5_000))))]:
            order = generator(f"sae {corpus.name}", 0).permutation(sorted(rows)).tolist()
            own = self.prompts(corpus, order) if corpus.template else [corpus.texts[row] for row in order]
            tokens = 0
            for start in range(0, len(own), 64):
                if tokens >= each:
                    break
                batch = own[start : start + 64]
                tokens += sum(end - begin for _, begin, end in extractor.tokenize(batch))
                texts += batch
        return list(dict.fromkeys(texts))

    def _train(
        self, store: ActivationStore, test: ActivationStore
    ) -> tuple[SAEForFeatureExtraction, dict[str, float]]:
        set_seed(0)
        sae = SAEForFeatureExtraction(SAEConfig(hidden_size=store.hidden_size, num_features=NUM_FEATURES, k=K))
        args = SAETrainingArguments(
            str(self.folder / ".work" / "sae"),
            num_train_epochs=self.sae_epochs,
            per_device_train_batch_size=1024,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            disable_tqdm=True,
        )
        SAETrainer(sae, args, train_dataset=store).train()
        sae.eval()
        return sae, evaluate_sae(sae, test).to_dict()

    def activations(self, corpus: Corpus, sae: SAEForFeatureExtraction) -> Activations:
        """Of every text of a corpus."""
        store = self.store(corpus)
        key = fingerprint_json([sae_fingerprint(sae), store.text_fingerprint, store.spec.to_dict()])
        path = self.folder / "features" / f"{corpus.name}-{key[:12]}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, vars(compute_activations(sae, store)))
        return Activations(**load_file(path))

    def finetuned(self, pool: Pool, sae: SAEForFeatureExtraction) -> SAEForFeatureExtraction:
        """The SAE fine-tuned on the training pool of a data set, as a recipe does by default."""
        key = fingerprint_json([sae_fingerprint(sae), pool.corpus.fingerprint, pool.pool])
        folder = self.folder / f"sae-{pool.name}-{key[:12]}"
        if not folder.exists():
            tuned = copy.deepcopy(sae)
            set_seed(0)
            args = SAETrainingArguments(
                str(self.folder / ".work" / "finetune"),
                objective="finetune",
                num_train_epochs=5,
                per_device_train_batch_size=1024,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            SAETrainer(tuned, args, train_dataset=self._training_store(pool)).train()
            shutil.rmtree(self._training_folder(pool))
            with atomic_folder(folder) as temporary:
                tuned.save_pretrained(temporary)
        return SAEForFeatureExtraction.from_pretrained(folder)

    def keyword_features(self, pool: Pool, sae: SAEForFeatureExtraction) -> UnintendedFeatures:
        """Features that peak on the keywords of a data set, in the texts of its training pool; none without any."""
        if not pool.keywords:
            return UnintendedFeatures.from_ids(sae, [])
        key = fingerprint_json([sae_fingerprint(sae), pool.corpus.fingerprint, pool.pool, pool.keywords, MAX_FEATURES])
        path = self.folder / "features" / f"keywords-{pool.name}-{key[:12]}.json"
        if not path.exists():
            extractor = self.extractor(pool.corpus)
            everything = len(pool.pool) == len(pool.corpus.texts)
            catalog = FeatureCatalog.build(
                sae,
                extractor,
                self.prompts(pool.corpus, None if everything else pool.pool),
                # Without the store the backbone runs again, over the training pool alone.
                store=self.store(pool.corpus) if everything else self._training_store(pool),
            )
            if not everything:
                shutil.rmtree(self._training_folder(pool))
            chosen = UnintendedFeatures.from_keywords(sae, catalog, pool.keywords, max_features=MAX_FEATURES)
            write_json(path, {"ids": chosen.feature_ids, "reasons": chosen.reasons})
        found = read_json(path)
        return UnintendedFeatures.from_ids(sae, found["ids"], reasons=found["reasons"])

    def _training_store(self, pool: Pool) -> ActivationStore:
        """The states of the training pool, copied out of those of the whole corpus."""
        folder = self._training_folder(pool)
        rows = [2 * row + side for row in pool.pool for side in range(2)] if pool.task == "preference" else pool.pool
        copy_store(self.store(pool.corpus), rows, folder, self.prompts(pool.corpus, pool.pool))
        return ActivationStore(folder)

    def _training_folder(self, pool: Pool) -> Path:
        return self.folder / ".work" / f"{pool.name}-training"

    def scrubbed(self, pool: Pool) -> Tensor:
        """Mean hidden states of all texts with the keywords taken out, `[N, D]`."""
        from selfreg.classifier.scrubbing import scrub

        key = fingerprint_json([pool.corpus.fingerprint, pool.keywords, LAYER, self.dtype])
        path = self.folder / "features" / f"scrubbed-{pool.name}-{key[:12]}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            corpus = Corpus(
                pool.corpus.name, scrubbed_texts(pool, scrub), pool.corpus.max_length, pool.corpus.template
            )
            before, after = self.prompts(pool.corpus), self.prompts(corpus)
            changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
            pooled = self.store(pool.corpus).pool("mean")
            if changed:
                pooled[changed] = self.extractor(corpus).pool([after[i] for i in changed])
            save_tensors(path, {"pooled": pooled, "changed": torch.tensor(len(changed))})
        return load_file(path)["pooled"]


def compute_activations(sae: SAEForFeatureExtraction, store: ActivationStore) -> Activations:
    """Of every text of a store."""
    means, maxima, at_last = pre_activations(sae, store)
    return Activations(
        pooled=store.pool("mean"),
        means=means,
        maxima=maxima,
        largest=largest_activations(sae, store),
        topk_means=mean_activations(sae, store),
        last=store.pool("last"),
        at_last=at_last,
    )


def mean_activations(sae: SAEForFeatureExtraction, store: ActivationStore) -> Tensor:
    """Mean activation behind the TopK of all features in every text, `[N, F]`."""
    totals = torch.zeros(store.num_texts, sae.config.num_features)
    counts = torch.zeros(store.num_texts)
    with torch.inference_mode():
        for shard in store.shards():
            texts = shard.text_ids.long()
            counts += torch.bincount(texts, minlength=store.num_texts)
            for start in range(0, len(texts), _CHUNK):
                features = sae.encode(shard.hidden_states[start : start + _CHUNK].float())
                place = texts[start : start + _CHUNK].unsqueeze(1) * sae.config.num_features + features.indices
                totals.view(-1).index_add_(0, place.flatten(), features.values.flatten())
    return totals / counts.unsqueeze(1)


def pre_activations(sae: SAEForFeatureExtraction, store: ActivationStore) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and largest ReLU pre-activation of all features in every text, and that at its last token, `[N, F]` each.

    A mean pool is linear, so that taking features out of pooled states needs no more than their mean activations.
    """
    rows = UnintendedFeatures.from_ids(sae, range(sae.config.num_features))
    means = torch.zeros(store.num_texts, len(rows))
    maxima = torch.zeros(store.num_texts, len(rows))
    at_last = torch.zeros(store.num_texts, len(rows))
    with torch.inference_mode():
        for shard in store.shards():
            texts = shard.text_ids.long()
            for start in range(0, len(texts), _CHUNK):
                part = slice(start, start + _CHUNK)
                values = feature_activations(
                    shard.hidden_states[part].float(), rows.encoder_directions, rows.encoder_bias, rows.input_norm
                )
                means.index_add_(0, texts[part], values)
                ends = torch.ones(len(values), dtype=torch.bool)
                ends[:-1] = texts[part][1:] != texts[part][:-1]
                # The last of a chunk may not be that of its text: the next chunk then writes over it.
                at_last[texts[part][ends]] = values[ends]
                first, end = int(texts[part][0]), int(texts[part][-1]) + 1
                index = (texts[part] - first).unsqueeze(1).expand_as(values)
                maxima[first:end] = maxima[first:end].scatter_reduce(0, index, values, "amax")
            counts = torch.bincount(texts - shard.first_text, minlength=shard.end_text - shard.first_text)
            means[shard.first_text : shard.end_text] /= counts.unsqueeze(1)
    return means, maxima, at_last


def copy_store(source: ActivationStore, rows: Sequence[int], folder: Path, prompts: Sequence[str]) -> None:
    """Writes the states of some texts of a store, in the order of `rows`, as a store of its own."""
    writer = StoreWriter(
        folder,
        source.spec,
        text_fingerprint=fingerprint_strings(prompts),
        num_texts=len(rows),
        dtype=torch.float32,
        pooling="mean",
        shard_tokens=65_536,
        overwrite=True,
    )
    wanted = torch.tensor(rows)
    if not bool((wanted[1:] > wanted[:-1]).all()):
        raise ValueError("rows of a store are copied in their order: sort the training pool")
    done = shards = 0
    for shard in source.shards():
        own = wanted[(wanted >= shard.first_text) & (wanted < shard.end_text)]
        if not len(own):
            continue
        keep = torch.isin(shard.text_ids.long(), own)
        number = torch.searchsorted(wanted, shard.text_ids[keep].long())
        writer.write(
            shards,
            StoreShard(
                first_text=done,
                end_text=done + len(own),
                hidden_states=shard.hidden_states[keep],
                text_ids=number.int(),
                positions=shard.positions[keep],
                token_ids=shard.token_ids[keep],
            ),
        )
        done, shards = done + len(own), shards + 1
    writer.finish()


def scrubbed_texts(pool: Pool, scrub: Any) -> list[str]:
    """The texts of a pool without its keywords; of pairs the last replies."""
    texts = pool.corpus.texts
    if pool.task != "preference":
        return list(scrub(texts, pool.keywords))
    pairs = [json.loads(text) for text in texts]
    for side in ("chosen", "rejected"):
        replies = scrub([pair[side][-1]["content"] for pair in pairs], pool.keywords)
        for pair, reply in zip(pairs, replies, strict=True):
            pair[side][-1]["content"] = reply
    for pair in pairs:
        if pair["chosen"] == pair["rejected"]:
            # Nothing is left to prefer; a space is no token of its own to speak of, and keeps it a pair.
            pair["rejected"][-1]["content"] += " "
    return [json.dumps(pair, ensure_ascii=False) for pair in pairs]
