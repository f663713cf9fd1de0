"""From the small files of results to tables (Markdown, JSON) and figures."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from benchmarks.controllability import bootstrap
from benchmarks.controllability.bootstrap import Unit
from benchmarks.controllability.figures import write_figures
from benchmarks.controllability.methods import MEASURED
from benchmarks.controllability.names import METHODS, SELFREG, result_key

from selfreg.features.limits import MAX_ATTRIBUTE_FEATURES
from selfreg.utils.files import atomic_path, read_json, write_json

Results = dict[str, Any]
_ORDER = ("plain", *(name for name in METHODS if name != "plain"))
_KINDS = {
    "task": "The three tasks",
    "planted": "Planted ties",
    "tie": "Ties resampled into real texts",
    "found": "Shifts as found",
}
REMARKS = Path(__file__).with_name("remarks.json")
"""What a person found out of a result, by data set: a list of sentences that are printed under its table."""
CUT = 10.0
"""How many times smaller unintended_use should become."""


def write_summary(output: Path) -> Results:
    """Writes `results.json`, `RESULTS.md` and `figures/` from what is under `results/`."""
    found = {path.parent.name: summarize(path.parent) for path in sorted((output / "results").glob("*/data.json"))}
    # A data set that was begun and cut short before its first result has nothing to show.
    shown = {name: part for name, part in found.items() if part["methods"] or part["stale"]}
    ordered = {name: part for kind in _KINDS for name, part in shown.items() if part["kind"] == kind}
    write_json(output / "results.json", ordered)
    with atomic_path(output / "RESULTS.md") as temporary:
        temporary.write_text(markdown(ordered), encoding="utf8")
    write_figures(ordered, output / "figures")
    return ordered


def summarize(folder: Path) -> Results:
    """One data set: all methods on all eval sets, against plain and against random features.

    Seeds and results of other settings than those of the last run are named in `stale`, and count nothing.
    """
    about = read_json(folder / "data.json")
    trials = {
        int(path.parent.name.removeprefix("seed-")): read_json(path) for path in folder.glob("seed-*/trial.json")
    }
    settings = about.pop("settings", None)
    old = {seed for seed, trial in trials.items() if "settings" not in trial or trial["settings"] != settings}
    trials = {seed: trials[seed] for seed in sorted(trials.keys() - old)}
    runs: dict[str, dict[int, Results]] = {}
    missing: dict[str, list[str]] = {}
    stale = [f"seed {seed}" for seed in sorted(old)]
    for method in _ORDER:
        for seed in trials:
            path = folder / f"seed-{seed}" / f"{method}.json"
            result = read_json(path) if path.exists() else None
            if result is not None and result["key"] != result_key(trials[seed]["key"], method):
                # Of another version, other texts or another SAE: it has no place beside the others.
                stale.append(f"{method} of seed {seed}")
            elif result is not None and "does_not_apply" in result:
                missing.setdefault(method, []).append(result["does_not_apply"])
            elif result is not None:
                runs.setdefault(method, {})[seed] = result
    evals = list(next(iter(trials.values()))["evals"]) if trials else []
    methods = {method: {name: _figures(about, trials, runs, method, name) for name in evals} for method in runs}
    result = {
        **about,
        "seeds": len(trials),
        "seed_numbers": list(trials),
        "evals": evals,
        "worst_eval": _worst_eval(evals),
        "methods": methods,
    }
    result["features"] = {
        choice: _spread([trial["features"][choice] for trial in trials.values()])
        for choice in ("attribute", "keywords", "random")
    }
    counts = ("train", "balanced", "measured")
    result |= {name: _spread([trial[name] for trial in trials.values()]) for name in counts}
    remarks = read_json(REMARKS) if REMARKS.exists() else {}
    result["remarks"] = remarks.get(folder.name, [])
    result["does_not_apply"] = {
        method: f"{reasons[0]} ({len(reasons)} of {len(trials)} seeds)"
        for method, reasons in missing.items()
        if method != "zero_shot"
    }
    result["stale"] = stale
    result["acceptance"] = acceptance(result)
    return result


def _worst_eval(evals: Sequence[str]) -> str | None:
    """Where groups are best compared."""
    return next((name for name in ("even", "edits", "adversarial", "test") if name in evals), None)


def _figures(
    about: Results, trials: dict[int, Results], runs: dict[str, dict[int, Results]], method: str, name: str
) -> Results:
    own = runs[method]
    keys = list(next(iter(own.values()))["figures"][name])
    figures: Results = {key: _spread([result["figures"][name][key] for result in own.values()]) for key in keys}
    if about["folds"] > 1:
        # The cells of one fold are too small to be read: those of all folds together are not.
        units = units_of(about, trials, own, own, name)
        figures["worst_group_accuracy"] = _spread([bootstrap.value(unit, "worst_group_accuracy") for unit in units])
    compared = ["accuracy", "worst_group_accuracy", *(["f1"] if about["score"] == "f1" else [])]
    for reference in ("plain", *([control(method)] if method in SELFREG else [])):
        if method != reference and reference in runs:
            units = units_of(about, trials, own, runs[reference], name)
            found = {figure: bootstrap.compare(units, figure) for figure in compared} if units else {}
            figures[f"against_{reference}"] = {
                figure: asdict(difference) if difference else None for figure, difference in found.items()
            }
    return figures


def control(method: str) -> str:
    """The same method with random features: an offset by any features moves groups where the terms do not."""
    family = "selfreg_offset_random" if method.startswith("selfreg_offset") else "selfreg_random"
    return f"{family}_keywords" if method.endswith("_keywords") else family


def units_of(
    about: Results, trials: dict[int, Results], own: dict[int, Results], other: dict[int, Results], name: str
) -> list[Unit]:
    """Both methods on the texts that both were measured on: a unit a seed, or a cross-validation."""
    parts: dict[int, list[tuple[Any, ...]]] = {}
    for seed in sorted(own.keys() & other.keys()):
        given = trials[seed]["evals"][name]
        place = {row: i for i, row in enumerate(given["rows"])}
        sides = [
            dict(zip(result["rows"].get(name, given["rows"]), result["right"][name], strict=True))
            for result in (own[seed], other[seed])
        ]
        parts.setdefault(seed // about["folds"], []).extend(
            (row, given["labels"][place[row]], given["groups"][place[row]], sides[0][row] == "1", sides[1][row] == "1")
            for row in given["rows"]
            if row in sides[0] and row in sides[1]
        )
    units = []
    for rows in parts.values():
        columns = list(zip(*rows, strict=True))
        units.append(
            Unit(np.array(columns[0]), np.array(columns[1]), columns[2], np.array(columns[3]), np.array(columns[4]))
        )
    return units


def _spread(values: Sequence[float | None]) -> Results | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": mean(known), "sd": stdev(known) if len(known) > 1 else None, "n": len(known)}


def acceptance(result: Results) -> Results:
    """Whether the control holds: what the score costs, what the use comes to, and what the worst group gains."""
    methods, score, worst = result["methods"], result["score"], result["worst_eval"]
    # Where no feature tells the attribute by the few texts against the tie, it is the keywords' features that count.
    method = next((name for name in ("selfreg", "selfreg_keywords") if name in methods), None)
    if method is None or "plain" not in methods:
        return {}
    ours, plain = methods[method], methods["plain"]
    against = ours["test"]["against_plain"][score]
    # Of the features that were chosen. The tables' is of all that tell the attribute, the same for every method.
    chosen = "unintended_use_attribute" if method == "selfreg" else "unintended_use_keywords"
    use = [part["test"].get(chosen) for part in (plain, ours)]
    found: Results = {
        "method": method,
        "score": score,
        "score_difference": against,
        "within_one_standard_error": against is not None and against["difference"] >= -against["reference_error"],
        "use_plain": use[0] and use[0]["mean"],
        "use_selfreg": use[1] and use[1]["mean"],
    }
    if use[0] and use[1]:
        found["use_cut"] = use[0]["mean"] / max(use[1]["mean"], 1e-9)
        found["use_cut_enough"] = found["use_cut"] >= CUT
    part = ours[worst]
    found["worst_group_on"] = worst
    for name, reference in (("plain", "plain"), ("random", control(method))):
        gain = part.get(f"against_{reference}", {}).get("worst_group_accuracy")
        found[f"worst_group_against_{name}"] = gain
        found[f"worst_group_above_{name}"] = gain is not None and gain["low"] > 0
    balanced = methods.get("balanced", {}).get(worst, {}).get("worst_group_accuracy")
    found["worst_group_ceiling"] = balanced and balanced["mean"]
    return found


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """All tables."""
    lines = ["# Controllability", "", *_head(), ""]
    lines += ["## Does the control hold?", "", *_acceptance_table(results), ""]
    for kind, title in _KINDS.items():
        parts = {name: part for name, part in results.items() if part["kind"] == kind}
        if parts:
            lines += [f"## {title}", ""]
        for name, part in parts.items():
            lines += [f"### {name}", "", *_about(part), ""]
            lines += [*_table(part), ""] if part["methods"] else []
            lines += [line for remark in part["remarks"] for line in (remark, "")]
    return "\n".join(lines)


def _head() -> list[str]:
    return [
        "Mean ± standard deviation over seeds. `Δ` against plain on the same texts, with a 95 % interval of the "
        "paired bootstrap over texts and seeds. Use and dependence are measured against the same features for all "
        f"methods of a data set: up to {MEASURED} that tell the attribute, of which selfreg is given the first "
        f"{MAX_ATTRIBUTE_FEATURES}; where none "
        "does, those of the keywords. `selfreg_random` and `selfreg_random_keywords`: as many features drawn at "
        "random as by attribute and by keyword, the controls, also of the offset alone (`selfreg_offset_random`); "
        "`Δ random features` is against the one that goes with the method. `selfreg_features`: what selfreg's "
        "features say is set aside, and not what the group says. `balanced`: plain, trained on texts in which label "
        "and group have nothing to do with each other; "
        "`balanced_l2` with a ridge chosen by cross-validation, "
        "as selfreg's and `l2`. `oracle_50`: that, told the group of every text it judges, of whose log "
        "p(label | group) in the training set it gets 50 %: how one head trained on balanced texts trades the "
        "worst group for the score where the tie holds. `AUC within groups`: how well labels are told apart among "
        "texts of one group, whatever is made of the group itself.",
    ]


def _acceptance_table(results: Results) -> list[str]:
    rows = []
    for name, part in results.items():
        found = part["acceptance"]
        if not found:
            continue
        cut = found.get("use_cut")
        rows.append(
            [
                name if found["method"] == "selfreg" else f"{name} ({found['method']})",
                f"{_difference(found['score_difference'])} {_yes(found['within_one_standard_error'])}",
                ""
                if cut is None
                else f"{found['use_plain']:.3f} → {found['use_selfreg']:.4f} {_yes(found['use_cut_enough'])}",
                f"{_difference(found['worst_group_against_plain'])} {_yes(found['worst_group_above_plain'])}",
                f"{_difference(found['worst_group_against_random'])} {_yes(found['worst_group_above_random'])}",
                "" if found["worst_group_ceiling"] is None else f"{found['worst_group_ceiling']:.3f}",
            ]
        )
    return _grid(
        [
            "selfreg on",
            "test score, Δ plain (within one standard error)",
            f"use of the chosen features, plain → selfreg (cut {CUT:.0f}×)",
            "worst group, Δ plain (off zero)",
            "worst group, Δ random features (off zero)",
            "worst group of `balanced`",
        ],
        rows,
    )


def _about(part: Results) -> list[str]:
    features = ", ".join(
        f"{round(number['mean'])} by {choice}" for choice, number in part["features"].items() if number is not None
    )
    folds = f", folds of {part['folds']}-fold cross-validations" if part["folds"] > 1 else ""
    what = "pairs" if part["task"] == "preference" else "texts"
    sizes = ", ".join(
        f"{round(part[name]['mean'])} {title}{what}"
        for name, title in (("train", "training "), ("balanced", "balanced "))
        if part[name] is not None
    )
    if part["measured"] is not None:
        features += f"; use and dependence are measured on {round(part['measured']['mean'])}"
    numbers = ", ".join(map(str, part["seed_numbers"]))
    lines = [f"{part['about']}.", "", f"Seeds {numbers}{folds}; {sizes}; unintended features: {features}."]
    lines += [f"`{method}` does not apply: {reason}." for method, reason in part["does_not_apply"].items()]
    if part["stale"]:
        lines.append(f"Left out, of other settings than the last run's: {', '.join(part['stale'])}.")
    return lines


def _table(part: Results) -> list[str]:
    score, worst, evals = part["score"], part["worst_eval"], part["evals"]
    header = ["method", *(f"{score}, {name}" for name in evals), f"Δ {score}, {evals[0]}"]
    shifts = [name for name in evals if name not in ("test", "even")]
    header += [f"Δ {score}, {name}" for name in shifts]
    has_groups = any(own[worst]["worst_group_accuracy"] for own in part["methods"].values())
    if has_groups:
        header += [f"worst group, {worst}", f"Δ worst group, {worst}", "the same, Δ random features"]
        header += [f"AUC within groups, {worst}", "leakage, test"]
    header += ["use, test", "dependence, test"]
    if any("consistency" in own[worst] for own in part["methods"].values()):
        header.append(f"verdicts that stay, {worst}")
    rows = []
    for method, own in part["methods"].items():
        seeds = own["test"][score]["n"]
        row = [
            method if seeds == part["seeds"] else f"{method} ({seeds} seeds)",
            *(_number(own[name][score]) for name in evals),
        ]
        row += [_delta(own[name], score) for name in (evals[0], *shifts)]
        if has_groups:
            row += [_number(own[worst]["worst_group_accuracy"]), _delta(own[worst], "worst_group_accuracy")]
            row.append(_difference(own[worst].get(f"against_{control(method)}", {}).get("worst_group_accuracy")))
            row.append(_number(own[worst].get("auc_within_groups")))
            row.append(_number(own["test"]["leakage"]))
        row += [_number(own["test"]["unintended_use"], 4), _number(own["test"]["unintended_dependence"])]
        if header[-1].startswith("verdicts"):
            row.append(_number(own[worst].get("consistency")))
        rows.append(row)
    return _grid(header, rows)


def _delta(figures: Results, figure: str) -> str:
    return _difference(figures.get("against_plain", {}).get(figure))


def _difference(found: Results | None) -> str:
    return "" if found is None else f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _number(found: Results | None, digits: int = 3) -> str:
    if found is None:
        return ""
    sd = "" if found["sd"] is None else f" ± {found['sd']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{sd}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
