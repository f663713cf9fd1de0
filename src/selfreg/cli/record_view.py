"""How a feature looks in a terminal. What strangers wrote is shown as it is: no markup, no control characters."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from selfreg.features.records import FeatureRecord, Score, VerdictName, Vote
from selfreg.features.review import evenly_split
from selfreg.features.spans import Span

VERDICT_STYLES: dict[VerdictName | None, str] = {"Yes": "green", "Probably": "green", "Maybe": "red", "No": "red"}

_MARGIN = "  "
_JOINERS = "\u200c\u200d"  # format characters that words and emoji are spelt with
_QUARTERS = ("weakest quarter", "second quarter", "third quarter", "strongest quarter")
# How many of the characters before a peak are measured: more than any terminal is wide.
_LONGEST = 1000


def printable(text: str) -> str:
    """`text` on one line, without characters that would steer a terminal or turn the reading direction."""
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cf" and character not in _JOINERS:
            continue
        kept.append(" " if category in ("Cc", "Zl", "Zp", "Cs", "Co", "Cn") else character)
    return " ".join("".join(kept).split())


def verdict_text(record: FeatureRecord) -> Text:
    """The verdict on a feature, or why there is none."""
    if record.verdict is not None:
        return Text(record.verdict, style=VERDICT_STYLES[record.verdict])
    if not record.votes:
        return Text("–", style="dim")
    return Text("split" if evenly_split(record) else "undecided", style="yellow")


def explanation_text(record: FeatureRecord) -> Text:
    """The phrase; dim where it does not describe the spans."""
    if record.explanation is None:
        return Text("cannot tell" if record.explained_by is not None else "–", style="dim")
    return Text(printable(record.explanation), style="" if record.explained else "dim")


def feature_table(records: Iterable[FeatureRecord]) -> Table:
    """One line a feature."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, expand=True)
    table.add_column("feature", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("explanation", ratio=1, no_wrap=True, overflow="ellipsis")
    for name in ("detect.", "fuzzing", "probe", "density"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        figures = [_figure(record, name) for name in ("detection", "fuzzing", "probe")]
        density = percent(record.density)
        table.add_row(str(record.feature), verdict_text(record), explanation_text(record), *figures, density)
    return table


def percent(share: float) -> str:
    """Two figures that count, also where they are far behind the point."""
    if share == 0:
        return "0 %"
    digits = 0 if share >= 0.1 else 1 if share >= 0.01 else 2
    return f"{100 * share:.{digits}f} %" if share >= 0.0001 else f"{100 * share:.0e} %"


def record_view(record: FeatureRecord, *, width: int, max_spans: int | None = None) -> Group:
    """All evidence on a feature.

    Args:
        record: the feature.
        width: of the terminal.
        max_spans: the strongest texts that are shown, and nothing of the other evidence; None: all of it.
    """
    parts: list[RenderableType] = [_heading(record)]
    parts += list(_facts(record, everything=max_spans is None))
    parts += _section("strongest texts", record.spans[:max_spans], width)
    if max_spans is None:
        parts += _all_evidence(record, width)
    else:
        parts += _section("silent, with a word of these", record.near_misses[: max(1, max_spans // 3)], width)
    if record.votes:
        parts += [Text(), Text("votes", style="bold"), _votes(record.votes)]
    return Group(*parts)


def _heading(record: FeatureRecord) -> Text:
    phrase = explanation_text(record)
    phrase.stylize("bold")
    return Text.assemble((f"feature {record.feature}", "bold cyan"), "  ", phrase)


def _facts(record: FeatureRecord, *, everything: bool) -> Iterator[RenderableType]:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    active = f"{percent(record.density)} of the tokens, {record.num_texts:,} texts"
    table.add_row("active on", f"{active}; mean {record.mean_activation:.3g}, largest {record.max_activation:.3g}")
    if record.explained_by is not None:
        verdict = record.explanation_verdict or "nothing decided"
        says = "found no phrase" if record.explanation is None else f"does it describe the texts? {verdict}"
        table.add_row("explained by", Text(f"{printable(record.explained_by)}: {says}"))
    if record.scores:
        table.add_row("scores", Text("   ".join(_score(name, score) for name, score in record.scores.items())))
    if record.promoted_tokens:
        table.add_row("promotes", _tokens(record.promoted_tokens))
    if everything and record.nearest:
        near = ", ".join(f"{neighbour.feature} ({neighbour.cosine:+.2f})" for neighbour in record.nearest)
        table.add_row("nearest", Text(near))
    for title, shares in (("by label", record.label_shares), ("by group", record.group_shares)):
        if shares:
            table.add_row(
                title, Text(", ".join(f"{printable(name)} {percent(share)}" for name, share in shares.items()))
            )
    if record.label_verdicts:
        verdicts: list[Text] = []
        for label, verdict in record.label_verdicts.items():
            verdicts.append(Text.assemble(printable(label), " ", (verdict, VERDICT_STYLES[verdict])))
        table.add_row("legitimate for", Text(", ").join(verdicts))
    if record.votes:
        by = "" if record.decided_by is None else f"  by {printable(record.decided_by)}"
        when = "" if record.decided_at is None else f", {printable(record.decided_at)}"
        table.add_row("verdict", Text.assemble(verdict_text(record), (f"{by}{when}", "dim")))
    yield table


def _all_evidence(record: FeatureRecord, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = []
    names = _QUARTERS if len(record.quantile_spans) == len(_QUARTERS) else [""] * len(record.quantile_spans)
    for name, spans in reversed(list(zip(names, record.quantile_spans, strict=True))):
        parts += _section(f"other texts, {name}", sorted(spans, key=lambda span: -span.activation), width)
    parts += _section("silent, though they hold a word of the strongest texts (marked)", record.near_misses, width)
    return [*parts, *_section("silent, at random", record.silent_spans, width)]


def _section(title: str, spans: Sequence[Span], width: int) -> list[RenderableType]:
    return [Text(), Text(title, style="bold"), *(span_line(span, width) for span in spans)] if spans else []


def span_line(span: Span, width: int) -> Text:
    """A span on one line, its peak below that of every other one."""
    figure = f"{span.activation:7.2f}" if span.activation else " " * 7
    room = max(width - cell_len(_MARGIN) - 7 - 2, 20)
    for_before = room * 3 // 5
    before = _end_of(_inner(span.before, left=True), for_before)
    peak = printable(span.peak) or "·"
    peak = peak if cell_len(peak) <= room // 3 else set_cell_size(peak, room // 3 - 1) + "…"
    after = _start_of(_inner(span.after, left=False), room - for_before - cell_len(peak))
    return Text.assemble(_MARGIN, (figure, "dim"), "  ", before, (peak, "bold reverse"), after, end="\n")


def _inner(text: str, *, left: bool) -> str:
    """One line of what stands beside a peak, with the space that parts them."""
    text = text[-_LONGEST:] if left else text[:_LONGEST]
    line = printable(text)
    if left:
        return f"{line} " if line and text[-1:].isspace() else line
    return f" {line}" if line and text[:1].isspace() else line


def _end_of(text: str, room: int) -> str:
    """`text` in `room` cells, at their right; cut at its beginning."""
    missing = room - cell_len(text)
    if missing >= 0:
        return " " * missing + text
    while cell_len(text) > room - 1:
        text = text[1:]
    return " " * (room - 1 - cell_len(text)) + "…" + text


def _start_of(text: str, room: int) -> str:
    return text if cell_len(text) <= room else set_cell_size(text, max(room - 1, 0)).rstrip() + "…"


def _tokens(tokens: Sequence[str]) -> Text:
    return Text("  ").join(Text(printable(token) or "␣", style="italic") for token in tokens)


def _figure(record: FeatureRecord, name: str) -> str:
    return f"{record.scores[name].balanced_accuracy:.2f}" if name in record.scores else "–"


def _score(name: str, score: Score) -> str:
    return f"{name} {score.balanced_accuracy:.2f} [{score.low:.2f}, {score.high:.2f}]"


def _votes(votes: Sequence[Vote]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for vote in votes:
        verdict: str = vote.verdict or "undecided"
        if vote.verdict is not None and 0 < (sure := vote.probabilities.get(vote.verdict, 0.0)) < 1:
            verdict += f" {sure:.2f}"
        about = "" if vote.label is None else f", for {printable(vote.label)}"
        judge = f"{_MARGIN}{printable(vote.judge)}{about}" + (" (a person)" if vote.person else "")
        style = VERDICT_STYLES.get(vote.verdict, "yellow")
        table.add_row(Text(judge), Text(verdict, style=style), Text(printable(vote.reason or ""), style="dim"))
    return table
