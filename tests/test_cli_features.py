import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from chat_helpers import KEY, ScriptedServer, completion, scripted_server
from conftest import tiny_backbone
from helpers import make_sae
from selfreg import FeatureCatalog, HiddenStateExtractor
from selfreg.cli import app
from selfreg.cli.review import _fitting_view
from selfreg.features.decisions import with_vote
from selfreg.features.records import Vote
from selfreg.features.spans import Span

runner = CliRunner()
RUBRIC = "Legitimate: symptoms of the patient. Not legitimate: the gender of the patient."


def invoke(*arguments: object, keys: str | None = None) -> Any:
    return runner.invoke(app, ["features", *map(str, arguments)], input=keys)


def run(*arguments: object, keys: str | None = None) -> str:
    result = invoke(*arguments, keys=keys)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def fails(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return str(result.stderr)


@pytest.fixture(scope="module")
def built(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> FeatureCatalog:
    extractor = HiddenStateExtractor(tiny_backbone(), tokenizer, layer=1, max_length=32, name="tiny")
    return FeatureCatalog.build(make_sae(extractor), extractor, texts)


@pytest.fixture
def folder(built: FeatureCatalog, tmp_path: Path) -> Path:
    """A catalogue of which nothing is explained."""
    built.save_pretrained(tmp_path / "catalog")
    return tmp_path / "catalog"


def vote(folder: Path, feature: int, **verdicts: str) -> None:
    """An explanation, and votes of models on it, as they would be saved."""
    catalog = FeatureCatalog.from_pretrained(folder)
    catalog.update(feature, explanation=f"phrase {feature}", explanation_verdict="Yes", explained_by="m")
    for judge, verdict in verdicts.items():
        sure, _, told = verdict.partition(" ")
        probabilities = {"Yes": float(told), "No": 1 - float(told)} if told else {}
        given = Vote(judge, sure, probabilities, reason="Because.", at="2026-01-01T00:00:00+00:00")  # type: ignore[arg-type]
        catalog.records[feature] = with_vote(catalog[feature], given)
    catalog.save_pretrained(folder)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Answers all questions: with Yes where options are asked for, else with a phrase."""

    def answer(body: dict[str, Any]) -> Any:
        chosen = "response_format" in body
        return completion('{"answer": "Yes"}' if chosen else "a word about illness")

    with scripted_server() as scripted:
        scripted.script = [answer]
        yield scripted


def test_build_from_texts_with_labels_and_groups(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path
) -> None:
    tiny_backbone().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    extractor = HiddenStateExtractor.from_pretrained(str(tmp_path / "model"), layer=1, max_length=32)
    make_sae(extractor).save_pretrained(tmp_path / "sae")
    rows = [
        {"text": text, "ill": "yes" if "fever" in text else "no", "sex": "f" if "she" in text else None}
        for text in texts
    ]
    # A row without a text is left out, and takes its label along.
    rows.insert(3, {"text": None, "ill": "odd", "sex": "odd"})
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["build", tmp_path / "sae", tmp_path / "texts.jsonl", "-o", tmp_path / "out"]
    told = run(*arguments, "--label", "ill", "--group", "sex", "--top-k", 3)
    assert "of 40 features active" in told
    assert f"tokens of {len(texts)} texts" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"features.parquet", "catalog.json", "README.md"}
    catalog = FeatureCatalog.from_pretrained(tmp_path / "out")
    active = next(record for record in catalog if record.spans)
    assert set(active.label_shares) == {"yes", "no"}
    assert set(active.group_shares) == {"f"}
    assert max(len(record.spans) for record in catalog) == 3
    assert "holds a catalogue already" in fails(*arguments)
    arguments[-1] = tmp_path / "other"
    assert "has no column 'sick'; it has text, ill, sex" in fails(*arguments, "--label", "sick")


def test_build_that_was_stopped_goes_on(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_backbone().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make_sae(HiddenStateExtractor.from_pretrained(str(tmp_path / "model"), layer=1)).save_pretrained(tmp_path / "sae")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["build", tmp_path / "sae", tmp_path / "texts.jsonl", "-o", tmp_path / "out"]

    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureCatalog, "build", stop)
    assert invoke(*arguments).exit_code != 0
    assert (tmp_path / "out" / ".work" / "states").is_dir()
    monkeypatch.undo()
    monkeypatch.setattr(HiddenStateExtractor, "iterate", stop)  # all states are there
    assert "features active" in run(*arguments)
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.parametrize(
    "arguments",
    [["explain"], ["score"], ["judge", "--rubric", RUBRIC], ["judge", "--rubric", "diagnosis", "--no-reasons"]],
    ids=["explain", "score", "judge", "judge per label"],
)
def test_dry_run_tells_what_the_run_then_takes(arguments: list[str], folder: Path, server: ScriptedServer) -> None:
    for feature in (1, 3):
        vote(folder, feature)
    command, *options = arguments
    settings = [command, folder, *options, "--endpoint", server.url, "--model", "m", "--features", "1,3"]
    before = (folder / "features.parquet").read_bytes()
    told = run(*settings, "--dry-run", "--price", "1000000", "0")
    assert not server.bodies
    assert (folder / "features.parquet").read_bytes() == before
    assert not (folder / "answers.jsonl").exists()
    calls = int(told.split(": about ")[1].split(" calls")[0])
    assert "(0 answered or coming twice)" in told
    prompt_tokens = told.split("twice), about ")[1].split(" tokens to read")[0]
    assert f"price about {prompt_tokens}.00" in told
    done = run(*settings)
    assert len(server.bodies) == calls > 0
    assert f"m: {calls} calls made, 0 answers were there already" in done
    again = run(*settings, "--dry-run")
    # After an explanation others may follow; here it is the same as before.
    assert f"about 0 calls to make ({calls} answered or coming twice)" in again
    run(*settings)
    assert len(server.bodies) == calls


def test_explain_score_judge(folder: Path, server: ScriptedServer) -> None:
    asked = ["--endpoint", server.url, "--model", "m", "--features", "2,3,4"]
    assert "3 of 3 features explained" in run("explain", folder, *asked)
    assert "probe: mean balanced accuracy" in run("score", folder, "--free")
    told = run("score", folder, *asked, "--examples", 2)
    assert "detection: mean balanced accuracy 0.500 over 3 explanations" in told
    told = run("judge", folder, *asked, "--rubric", RUBRIC, "--model", "n")
    assert "of 3 explained features 3 legitimate, 0 not, 0 undecided, 0 split" in told
    catalog = FeatureCatalog.from_pretrained(folder)
    assert [vote.judge for vote in catalog[3].votes] == ["m", "n"]
    assert catalog[3].votes[0].reason == "a word about illness"
    assert catalog[3].verdict == "Yes"
    assert set(catalog[3].scores) == {"probe", "detection", "fuzzing"}
    assert catalog[0].explanation is None


def test_judges_that_disagree_are_told(folder: Path, server: ScriptedServer) -> None:
    vote(folder, 1)
    vote(folder, 2)
    vote(folder, 3)

    def answer(body: dict[str, Any]) -> Any:
        no = body["model"] == "n" and "phrase 2" in str(body)
        return completion(json.dumps({"answer": "No" if no or "phrase 3" in str(body) else "Yes"}))

    server.script = [answer]
    settings = ["--rubric", RUBRIC, "--no-reasons", "--endpoint", server.url, "--model", "m", "--model", "n"]
    told = run("judge", folder, *settings)
    assert "of 3 explained features 1 legitimate, 1 not, 0 undecided, 1 split" in told
    assert "selfreg features review" in told
    told = run("agreement", folder)
    assert "67 %" in told
    assert "1 feature with a split vote" in told
    assert "m: Yes; n: No" in told
    assert "phrase 2" in run("show", folder, "--split")
    assert "phrase 3" in run("show", folder, "--unintended")
    assert "phrase 2" in run("show", folder, "--undecided")


def test_a_server_that_goes_away_loses_nothing(
    folder: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = server.script[0]
    server.script = [good] * 64 + [(401, {"error": f"no credit for {KEY}"})]
    monkeypatch.setenv("MY_KEY", KEY)
    settings = ["explain", folder, "--endpoint", server.url, "--model", "m", "--api-key-env", "MY_KEY"]
    told = fails(*settings, "--concurrency", 1)
    assert "401" in told
    assert "the same command goes on from there" in told.replace("\n", " ")
    assert KEY not in told
    catalog = FeatureCatalog.from_pretrained(folder)
    assert sum(record.explained for record in catalog) == 32
    active = sum(bool(record.spans) for record in catalog)
    server.script, before = [good], len(server.bodies)
    assert f"{active} of {active} features explained" in run(*settings)
    assert len(server.bodies) - before == 2 * active - 64


def test_stopped_by_a_key(folder: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(self: FeatureCatalog, *_args: object, **_kwargs: object) -> None:
        self.update(1, explanation="a phrase", explanation_verdict="Yes")
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureCatalog, "explain", explain)
    result = invoke("explain", folder, "--endpoint", server.url, "--model", "m")
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr.replace("\n", " ")
    assert FeatureCatalog.from_pretrained(folder)[1].explanation == "a phrase"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain"], "who shall answer? Give --local MODEL, or --endpoint URL --model NAME"),
        (["explain", "--model", "m"], "give --endpoint URL too"),
        (["explain", "--endpoint", "http://127.0.0.1:9/v1"], "Give --model NAME"),
        (["explain", "--endpoint", "here", "--model", "m"], "must be a whole address"),
        (["explain", "--local", "m", "--endpoint", "http://127.0.0.1:9/v1"], "not both"),
        (["explain", "--local", "/no/such/model"], "/no/such/model"),
        (["explain", "--local", "m", "--price", "1", "2"], "--price is for --dry-run"),
        (["explain", "--local", "m", "--features", "1;2"], "--features 1;2: give their numbers with commas"),
        (["explain", "--local", "m", "--features", "1,99"], "features [99] are not there: the catalogue has 0 to 39"),
        (
            ["explain", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", "NO_SUCH_KEY"],
            "the environment variable NO_SUCH_KEY",
        ),
        (["score", "--free"], "call explain first"),
        (["score", "--free", "--local", "m"], "--free asks no chat model"),
        (["judge", "--local", "m", "--rubric", "toxic_chats"], "did you mean 'toxic_chat'?"),
        (["judge", "--local", "m", "--rubric", "foo"], "there is no rubric 'foo': give one that comes with selfreg"),
        (["judge", "--local", "m", "--rubric", "no/such.yaml"], "no/such.yaml is not there"),
        (["judge", "--local", "m", "--local", "m", "--rubric", RUBRIC], "m is named twice"),
        (["show", "99"], "features [99] are not there: the catalogue has 0 to 39"),
        (["show", "1", "--split"], "name features, or give one of"),
        (["import", "no.csv", "--by", "Ada"], "there is no file no.csv"),
        (["review", "--by", " "], "by is empty"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, folder: Path) -> None:
    command, *options = arguments
    assert message in fails(command, folder, *options).replace("\n", " ")


def test_a_server_that_is_not_there(folder: Path, server: ScriptedServer) -> None:
    server.stop()
    told = fails("explain", folder, "--endpoint", server.url, "--model", "m")
    assert f"no chat server answers at {server.url}" in told
    assert "goes on from there" not in told


def test_a_rubric_without_a_field(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("task: t\nlabels: {a: b, c: d}\nlegitimate: [x]\n")
    assert "not_legitimate" in fails("judge", folder, "--local", "m", "--rubric", tmp_path / "r.yaml")


@pytest.mark.parametrize("command", ["show", "agreement", "review", "explain"])
def test_no_catalogue_there(command: str, tmp_path: Path) -> None:
    assert "a catalogue is made by `selfreg features build`" in fails(command, tmp_path / "none")
    (tmp_path / "sae").mkdir()
    assert "it is not a feature catalogue" in fails(command, tmp_path / "sae")


def test_verdicts_on_another_sae_are_refused(folder: Path) -> None:
    run("review", folder, "--by", "Ada", keys="yq")
    log = folder / "decisions.jsonl"
    log.write_text(log.read_text().replace('"sae": "', '"sae": "0'))
    assert "holds verdicts on the features of another SAE" in fails("show", folder)


def test_show_as_a_table_and_as_json(folder: Path) -> None:
    vote(folder, 2, m="No")
    told = run("show", folder, "--limit", 3)
    assert "phrase 2" in told.splitlines()[3]
    assert "3 of " in told
    found = json.loads(run("show", folder, 2, "--json"))
    assert [(record["feature"], record["verdict"]) for record in found] == [(2, "No")]
    assert found[0]["spans"][0]["peak"]
    assert len(json.loads(run("show", folder, "--json"))) == sum(
        bool(r.spans) for r in FeatureCatalog.from_pretrained(folder)
    )


def test_all_evidence_on_a_feature(folder: Path) -> None:
    vote(folder, 2, m="Yes 0.8", n="No 0.1")
    catalog = FeatureCatalog.from_pretrained(folder)
    told = run("show", folder, 2)
    for title in ("strongest texts", "weakest quarter", "silent, at random", "votes", "nearest", "active on"):
        assert title in told
    assert "m  Yes 0.80" in told
    assert "split" in told
    for span in catalog[2].spans:
        assert span.peak in told


def test_what_strangers_wrote_does_not_steer_the_terminal(folder: Path) -> None:
    vote(folder, 2, m="No")
    catalog = FeatureCatalog.from_pretrained(folder)
    evil = "[red]a\x1b[31mb\u202ec\rd\x00e [/nope] :package: \u2028 f"
    catalog.update(
        2,
        spans=[Span(0, 0, 1.0, evil, evil, evil), Span(1, 0, 0.5, "患" * 500, "者" * 500, "🤒" * 500)],
        explanation=evil,
        promoted_tokens=[evil, "", " "],
        label_shares={evil: 0.5},
        votes=[Vote(evil, "No", reason=evil)],
    )
    catalog.save_pretrained(folder)
    clean = "[red]a [31mbc d e [/nope] :package: f"
    for told in (run("show", folder), run("show", folder, 2), run("review", folder, "--by", "Ada", keys="q")):
        assert clean[:15] in told  # the table cuts the rest off
        assert not {"\x1b", "\u202e", "\r", "\x00", "\u2028"} & set(told)
    assert clean in run("show", folder, 2)
    assert max(map(cell_len, run("show", folder, 2).splitlines())) <= 80


def test_csv_out_and_in(folder: Path, tmp_path: Path) -> None:
    vote(folder, 2, m="Yes")
    table = tmp_path / "features.csv"
    assert "fill in person_verdict" in run("export", folder, table)
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["feature"] == "2":
            row.update(person_verdict="no", person_reason="It is the gender.")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    # An earlier verdict of the same person, which the log holds, does not come back.
    run("review", folder, "--only", "all", "--by", "Ada", keys="y" * 40)
    assert decided(folder)[2] == "Yes"
    assert "1 verdict of Ada taken" in run("import", folder, table, "--by", "Ada")
    record = FeatureCatalog.from_pretrained(folder)[2]
    assert (record.verdict, record.decided_by, record.reason) == ("No", "Ada", "It is the gender.")
    rows[0].update(feature="99", person_verdict="Yes")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert "features [99] are not there" in fails("import", folder, table, "--by", "Eve")
    assert all(vote.judge != "Eve" for record in FeatureCatalog.from_pretrained(folder) for vote in record.votes)


def decided(folder: Path) -> dict[int, str | None]:
    """What a person decided, as a new process would find it."""
    catalog = FeatureCatalog.from_pretrained(folder)
    return {record.feature: v.verdict for record in catalog for v in record.votes if v.person}


def shown(told: str) -> list[int]:
    """The features that a review showed, in order."""
    return [int(line.split()[1]) for line in told.splitlines() if line.startswith("feature ")]


def test_review_shows_first_what_matters_most(folder: Path) -> None:
    vote(folder, 4, m="Yes 0.9")
    vote(folder, 6, m="Yes 0.6")
    vote(folder, 8)
    vote(folder, 11, m="Yes 0.9", n="No 0.1")
    told = run("review", folder, "--by", "Ada", keys="ssssq")
    found = shown(told)
    assert found[:4] == [11, 8, 6, 4]
    densities = {record.feature: record.density for record in FeatureCatalog.from_pretrained(folder)}
    assert densities[found[4]] == max(share for feature, share in densities.items() if feature not in found[:4])
    assert "0 decided by Ada" in told


def test_review_with_undo_back_and_help(folder: Path) -> None:
    for feature in (4, 6, 8):
        vote(folder, feature)
    order = shown(run("review", folder, "--only", "undecided", "--by", "x", keys="ssssq"))
    assert set(order) == {4, 6, 8}
    first, second, third = order
    told = run("review", folder, "--only", "undecided", "--by", "Ada", keys="bu?xyNpubmsq")
    assert "this is the first one" in told
    assert "there is nothing to undo" in told
    assert "the classifier may use it" in told
    assert "y, p, m, n, s, b, u, q or ?" in told
    # y and n; p and its undo; back to the second one, and another verdict.
    assert decided(folder) == {first: "Yes", second: "Maybe"}
    assert "2 decided by Ada" in told
    assert f"1 of {len(order)} left" in told
    # An undo brings an earlier verdict back, and what is decided is not asked again.
    told = run("review", folder, "--only", "all", "--by", "Ada", keys="s" * 4 + "nuq")
    again = run("review", folder, "--by", "Ada", keys="q")
    assert f"feature {first} " not in again
    assert decided(folder) == {first: "Yes", second: "Maybe"}
    assert third not in decided(folder)


def test_a_review_fits_the_screen(folder: Path) -> None:
    vote(folder, 3, m="Yes 0.9", n="No 0.1")
    console = Console(width=80, height=24)
    record = FeatureCatalog.from_pretrained(folder)[3]
    assert len(console.render_lines(_fitting_view(record, 20, width=80))) <= 20
    assert len(console.render_lines(_fitting_view(record, 40, width=80))) > 20


def test_review_to_the_end_can_still_be_undone(folder: Path) -> None:
    vote(folder, 4)
    told = run("review", folder, "--only", "undecided", "--by", "Ada", keys="yyuq")
    assert "that was the last one" in told
    assert decided(folder) == {}
    assert "1 decided by Ada" in run("review", folder, "--only", "undecided", "--by", "Ada", keys="y\r")
    assert "there is nothing to decide" in run("review", folder, "--only", "undecided", "--by", "Ada")


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, EOFError])
def test_every_key_is_on_disk_before_the_next(
    end: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    keys: Callable[[], str] = iter("ynmu").__next__

    def getchar() -> str:
        counts.append(len(decided(folder)))
        try:
            return keys()
        except StopIteration:
            raise end from None

    monkeypatch.setattr(typer, "getchar", getchar)
    result = invoke("review", folder, "--by", "Ada")
    assert counts == [0, 1, 2, 3, 2]
    assert len(decided(folder)) == 2
    if end is not SystemExit:
        assert result.exit_code == 0
        assert "2 decided by Ada" in result.stdout


def test_a_judge_may_save_while_a_person_reviews(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter("yq")

    def getchar() -> str:
        vote(folder, 30, m="No")
        return next(keys)

    monkeypatch.setattr(typer, "getchar", getchar)
    run("review", folder, "--by", "Ada")
    catalog = FeatureCatalog.from_pretrained(folder)
    assert catalog[30].verdict == "No"
    assert len(decided(folder)) == 1


def test_no_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def getchar() -> str:
        raise OSError("no /dev/tty")

    monkeypatch.setattr(typer, "getchar", getchar)
    assert "review needs a terminal" in fails("review", folder, "--by", "Ada")


@pytest.mark.parametrize(
    "command", ["build", "explain", "score", "judge", "show", "agreement", "export", "import", "review"]
)
def test_help_teaches(command: str) -> None:
    told = run(command, "--help")
    assert f"Example: selfreg features {command}" in told


def test_a_local_model_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time is in memory, and its tokens are counted, not estimated."""
    from selfreg.features.chat import Choice
    from selfreg.features.chat_usage import ChatUsage

    class Local:
        def __init__(self, name: str) -> None:
            self.name, self.usage = name, ChatUsage()

        def complete(self, conversations: Any, *, max_new_tokens: int = 64) -> list[str]:
            return ["a phrase"] * len(conversations)

        def choose(self, conversations: Any, options: Any) -> list[Choice]:
            return [Choice("Yes", {"Yes": 1.0})] * len(conversations)

        def count_tokens(self, text: str) -> int:
            return len(text.split())

    monkeypatch.setattr("selfreg.features.chat_local.LocalChatModel", Local)
    vote(folder, 2)
    settings = ["judge", folder, "--rubric", RUBRIC, "--local", "a", "--local", "b"]
    told = run(*settings, "--dry-run")
    assert told.count("about 2 calls to make") == 2
    assert "), about" not in told
    run(*settings)
    assert [v.judge for v in FeatureCatalog.from_pretrained(folder)[2].votes] == ["a", "b"]
