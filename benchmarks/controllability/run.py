"""The command line: everything that is not there yet is computed, then the tables and figures are written.

    SELFREG_DATA=/path/to/data python -m benchmarks.controllability --output runs/controllability --seeds 5 --jobs 2

Each (data set, seed, method) is one small file under `results/`; a run that was cut short goes on where it was, and
one with more seeds or methods computes what is new. With --only, tables hold all that is there so far.
"""

import argparse
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.controllability.datasets import DATASETS, NOT_ASKED, SEEN
from benchmarks.controllability.methods import MEASURED, DoesNotApply, Trial, head_arguments
from benchmarks.controllability.names import ABLATIONS, METHODS, result_key
from benchmarks.controllability.pool import Pool
from benchmarks.controllability.states import Workshop
from benchmarks.controllability.summary import write_summary
from transformers.utils.logging import disable_progress_bar

from selfreg import SAEForFeatureExtraction, UnintendedFeatures, __version__
from selfreg.features.limits import MAX_ATTRIBUTE_FEATURES
from selfreg.sae.fingerprint import sae_fingerprint
from selfreg.utils.files import fingerprint_json, read_json, write_json

DTYPES = ("float32", "bfloat16")
FIGURES = 4
"""Version of what is measured: with another, what lies there already is computed anew."""

SETS: dict[str, Any] = {
    "nargs": "+",
    "choices": list(DATASETS),
    "metavar": "DATA_SET",
}
"""Options of an argument that names data sets."""


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    output: Path
    seeds: range
    only: tuple[str, ...]
    methods: tuple[str, ...]
    jobs: int
    sae_tokens: int
    sae_data: tuple[str, ...]
    dtype: str = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--only",
        **SETS,
        default=list(NOT_ASKED),
        help="all but those with the question in front of the texts (…_asked), unless told otherwise",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[name for name in METHODS if name not in ABLATIONS],
        metavar="METHOD",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--summary", action="store_true", help="only write tables and figures of what is there")
    given = parser.parse_args()
    options = Options(
        output=given.output,
        seeds=range(given.first_seed, given.first_seed + given.seeds),
        only=tuple(given.only),
        methods=tuple(given.methods),
        jobs=given.jobs,
        sae_tokens=given.sae_tokens,
        sae_data=tuple(given.sae_data),
        dtype=given.dtype,
    )
    if not given.summary:
        run(options)
    write_summary(options.output)
    print(f"{options.output}: tables in RESULTS.md and results.json, pictures in figures/")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every command says of the seeds, the SAE and where all of it lies."""
    parser.add_argument("--output", type=Path, default=Path("runs/controllability"))
    parser.add_argument("--seeds", type=int, default=5, help="how many draws of each data set")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="of these; 0 to 4 are those by which selfreg's defaults were chosen"
    )
    parser.add_argument("--sae-tokens", type=int, default=100_000, help="tokens that the SAE is trained on")
    parser.add_argument(
        "--sae-data",
        **SETS,
        default=list(SEEN),
        help="data sets whose training texts the SAE sees: the same in every call, or it is another SAE",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of the backbone: the same in every call, or it is another SAE",
    )


def run(options: Options) -> None:
    """Computes what is not there yet, stage by stage."""
    _quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    pools = {name: DATASETS[name]() for name in {**dict.fromkeys(options.sae_data), **dict.fromkeys(options.only)}}
    for name in options.only:
        if any(bound % pools[name].folds for bound in (options.seeds.start, options.seeds.stop)):
            print(
                f"{name}: seeds {options.seeds.start} to {options.seeds.stop - 1} are no whole cross-validations of "
                f"{pools[name].folds} folds: their cells are read off parts"
            )
    with _stage("SAE", options.output):
        torch.set_num_threads(options.jobs)
        workshop(options).sae([pools[name] for name in options.sae_data])
        torch.set_num_threads(1)
    with _stage("hidden states", options.output):
        # Data sets share texts; not where they ask another question of them.
        corpora = {(pools[name].corpus.name, pools[name].corpus.fingerprint): name for name in options.only}
        _each(extract, [(options, name) for name in corpora.values()], options.jobs)
    with _stage("heads", options.output):
        # The longest first, so that no process waits for another's last.
        longest = sorted(options.only, key=lambda name: -len(pools[name].rows(options.seeds[0]).train))
        _each(run_pool, [(options, name) for name in longest], options.jobs)


class _stage:
    """Tells a stage's time, and keeps it."""

    def __init__(self, name: str, output: Path) -> None:
        self.name, self.output = name, output

    def __enter__(self) -> None:
        self.started = time.perf_counter()
        print(f"{self.name} …", flush=True)

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self.started
        print(f"{self.name}: {seconds:.0f} s", flush=True)
        path = self.output / "seconds.json"
        spent: dict[str, float] = read_json(path) if path.exists() else {}
        # Over all calls: one that goes on where another was cut short adds to it.
        write_json(path, {**spent, self.name: round(spent.get(self.name, 0.0) + seconds, 1)})


def _each(work: Callable[..., str], arguments: Iterable[tuple[Any, ...]], jobs: int) -> None:
    if jobs == 1:
        for own in arguments:
            print("  ", work(*own), flush=True)
        return
    # Not forked: torch's threads do not live through it.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as processes:
        for done in as_completed([processes.submit(work, *own) for own in arguments]):
            print("  ", done.result(), flush=True)


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("selfreg").setLevel(logging.ERROR)
    disable_progress_bar()


@cache
def workshop(options: Options) -> Workshop:
    """One a process: the backbone is loaded once."""
    return Workshop(options.output, sae_tokens=options.sae_tokens, dtype=options.dtype)


def extract(options: Options, name: str) -> str:
    """Hidden states of the texts of a data set."""
    started = time.perf_counter()
    store = workshop(options).store(DATASETS[name]().corpus)
    return f"{DATASETS[name]().corpus.name}: {store.num_tokens:,} tokens, {time.perf_counter() - started:.0f} s"


def run_pool(options: Options, name: str) -> str:
    """All seeds and methods of one data set that are not there yet."""
    started = time.perf_counter()
    shop, pool = workshop(options), DATASETS[name]()
    sae = shop.sae([DATASETS[own]() for own in options.sae_data])
    keywords = shop.keyword_features(pool, sae)
    folder = options.output / "results" / name
    settings = settings_key(options, pool, sae, keywords)
    write_json(folder / "data.json", {"settings": settings, **about(pool, keywords.reasons)})
    activations, done = None, 0
    for seed in options.seeds:
        own, key = folder / f"seed-{seed}", trial_key(settings, pool, seed)
        missing = [name for name in options.methods if not _is_there(own / f"{name}.json", result_key(key, name))]
        if not missing and _is_there(own / "trial.json", key):
            continue
        activations = activations or shop.activations(pool.corpus, sae)
        trial = Trial(pool, seed, sae, activations, keywords, shop)
        # First, so that a run which is cut short leaves nothing that passes for a result of these settings.
        write_json(own / "trial.json", {"settings": settings, "key": key, **about_trial(trial)})
        for method in missing:
            try:
                if method == "zero_shot" and seed != options.seeds.start:
                    raise DoesNotApply("asked once: it is not trained, and has no seed")
                result = trial.run(method)
            except DoesNotApply as reason:
                result = {"does_not_apply": str(reason)}
            write_json(own / f"{method}.json", {"key": result_key(key, method), **result})
            done += 1
    return f"{name}: {done} results, {time.perf_counter() - started:.0f} s"


def about(pool: Pool, keyword_reasons: list[str]) -> dict[str, Any]:
    """What a reader of the tables wants to know of a data set."""
    return {
        "about": pool.about,
        "kind": pool.kind,
        "task": pool.task,
        "score": pool.score,
        "folds": pool.folds,
        "labels": pool.labels,
        "keywords": list(pool.keywords),
        "keyword_features": keyword_reasons[:20],
        "texts": len(pool.corpus.texts),
    }


def about_trial(trial: Trial) -> dict[str, Any]:
    """The texts and features of a seed; the summary needs them."""
    pool, rows = trial.pool, trial.rows
    return {
        "train": len(rows.train),
        "balanced": len(rows.balanced) if rows.balanced is not None else None,
        "features": {name: len(chosen) for name, chosen in trial.choices.items()},
        "measured": len(trial.measure),
        "attribute_features": [
            f"{feature}: {reason}"
            for feature, reason in zip(
                trial.choices["attribute"].feature_ids[:10], trial.choices["attribute"].reasons, strict=False
            )
        ],
        "evals": {
            name: {
                "rows": own,
                "labels": [pool.label[row] for row in own],
                "groups": [pool.group[row] for row in own],
            }
            for name, own in rows.evals.items()
        },
    }


def settings_key(options: Options, pool: Pool, sae: SAEForFeatureExtraction, keywords: UnintendedFeatures) -> str:
    """Of all that the results of a data set hang on, whatever the seed and the method."""
    parts = [__version__, FIGURES, sae_fingerprint(sae), pool.corpus.fingerprint, options.dtype, keywords.feature_ids]
    parts += [pool.keywords, MAX_ATTRIBUTE_FEATURES, MEASURED, _budget(options.output)]
    parts += [pool.label, [str(group) for group in pool.group], pool.instruction]
    return fingerprint_json(parts)


def trial_key(settings: str, pool: Pool, seed: int) -> str:
    """Of a seed's texts under these settings."""
    rows = pool.rows(seed)
    return fingerprint_json([settings, seed, rows.train, rows.evals, rows.balanced])


def _budget(folder: Path) -> list[Any]:
    args = head_arguments(folder, 0)
    names = (
        "penalty_weight",
        "similarity",
        "dependence_weight",
        "offset_weight",
        "logit_decay",
        "learning_rate",
        "num_train_epochs",
        "ridge",
        "weight_decay",
    )
    return [getattr(args, name) for name in names]


def _is_there(path: Path, key: str) -> bool:
    return path.exists() and read_json(path)["key"] == key
