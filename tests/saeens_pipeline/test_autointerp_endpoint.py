"""The client against a server with OpenAI's protocol and all of its failures; and the interview, interrupted and resumed."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Canned, FakeEndpoint, Question, completion, failure, serving

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.autointerp.answers import FOLDER, Answers
from saeens_pipeline.language_models.autointerp.endpoint import (
    KEY_VARIABLE,
    SHOWN_CHARACTERS,
    URL_VARIABLE,
    Client,
    Endpoint,
    RefusedError,
    Reply,
)
from saeens_pipeline.language_models.autointerp.interview import MALFORMED_AT_FIRST, FeatureTexts, Interviewer, Verdict
from saeens_pipeline.language_models.autointerp.protocol import Examples
from saeens_pipeline.settings.autointerp import AutoInterpSettings

KEY = "sk-very-secret-0123456789"
REQUEST = {"model": "fake", "messages": [{"role": "system", "content": "-"}, {"role": "user", "content": "-"}], "temperature": 0}
SOON = {"retry_after_ms": "20"}


def rule(question: Question) -> str:
    """Explains texts by the letter that they begin with; then those fit that begin with it."""
    if question.explanation is None:
        return f"begins with {question.texts[0][0]}" if question.texts else "nothing"
    return json.dumps([int(text[0] == question.explanation[-1]) for text in question.texts])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    with serving(FakeEndpoint(rule)) as endpoint:
        monkeypatch.setenv(URL_VARIABLE, endpoint.url)
        monkeypatch.setenv(KEY_VARIABLE, KEY)
        yield endpoint


def _endpoint() -> Endpoint:
    endpoint = Endpoint.from_environment()
    assert endpoint is not None
    return endpoint


def _ask(timeout_seconds: float = 30, retries: int = 2) -> Reply:
    async def ask() -> Reply:
        client = Client(_endpoint(), timeout_seconds, retries)
        try:
            return await client.ask(REQUEST)
        finally:
            await client.close()

    return asyncio.run(ask())


def _subjects(n: int) -> list[FeatureTexts]:
    """Feature i fires on texts that begin with the i-th letter; the control is the next one's explanation."""
    letters = "abcdefghijklmnopqrst"
    return [
        FeatureTexts(
            Examples(
                (f"{letter}-shown 1", f"{letter}-shown 2"),
                (f"{letter}-held out", "A", f"{letter}-also", "B"),
                (True, False, True, False),
            ),
            (i + 1) % n,
        )
        for i, letter in enumerate(letters[:n])
    ]


def _interviewer(root: Path, **settings: Any) -> Interviewer:
    given = {"model": "fake", "requests_at_once": 3, "retries": 0} | settings
    return Interviewer(AutoInterpSettings.model_validate(given), Answers(root), Endpoint.from_environment())


def _run(interviewer: Interviewer, n: int = 6) -> list[Verdict | None]:
    return interviewer.interview(_subjects(n), lambda n, before=False: None)


# Where it is


def test_without_a_url_there_is_no_endpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert Endpoint.from_environment() is None and not Endpoint.is_configured()


@pytest.mark.parametrize(
    "url",
    [f"localhost:8080/v1?key={KEY}", f"ftp://x:{KEY}@host/v1", f"https://host/v1?api-key={KEY}", f"http://host:{KEY}/v1", "http://", "x"],
)
def test_an_invalid_address_is_refused_and_not_repeated_in_the_error(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL_VARIABLE, url)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigurationError, match=URL_VARIABLE) as caught:
        Endpoint.from_environment()
    assert KEY not in str(caught.value) and caught.value.__cause__ is caught.value.__context__ is None


def test_a_key_together_with_a_password_in_the_url_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL_VARIABLE, "http://me:hunter22222@localhost/v1")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(ConfigurationError, match="one of the two") as caught:
        Endpoint.from_environment()
    assert "hunter" not in str(caught.value) and KEY not in str(caught.value)


def test_a_key_with_a_line_break_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL_VARIABLE, "http://localhost/v1")
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\n{KEY}")
    with pytest.raises(ConfigurationError, match=KEY_VARIABLE) as caught:
        Endpoint.from_environment()
    assert KEY not in str(caught.value)


def test_a_missing_package_is_reported_with_its_install_command(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install .*\[autointerp\]"):
        Endpoint.from_environment()


def test_an_endpoint_shows_its_host_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL_VARIABLE, "https://me:hunter22222@example.com:8443/v1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert repr(_endpoint()) == "Endpoint(host='https://example.com:8443')"


# What it answers


def test_requests_and_replies_follow_the_protocol(fake: FakeEndpoint):
    fake.always = Canned(200, completion("yes"))
    assert _ask() == Reply("yes", False, 100, 10)
    assert fake.requests == [REQUEST]
    assert fake.headers[0]["authorization"] == f"Bearer {KEY}"


def test_a_password_in_the_url_is_sent_as_basic_authentication(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv(URL_VARIABLE, fake.url.replace("//", "//me:hunter%2022222@"))
    _ask()
    assert base64.b64decode(fake.headers[0]["authorization"].removeprefix("Basic ")) == b"me:hunter 22222"


def test_openai_variables_of_other_programs_are_not_sent(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY_VARIABLE)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"other-{KEY}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    _ask()
    assert KEY not in str(fake.headers)


@pytest.mark.parametrize("first", [failure(429, "slow down", **SOON), failure(500, "oops", **SOON), failure(503, "later", **SOON)])
def test_temporary_endpoint_errors_are_retried(first: Canned, fake: FakeEndpoint):
    fake.canned = [first, first]
    fake.always = Canned(200, completion("yes"))
    assert _ask(retries=2).text == "yes"
    assert len(fake.requests) == 3


def test_a_retry_waits_as_long_as_the_retry_after_header_demands(fake: FakeEndpoint, caplog: pytest.LogCaptureFixture):
    fake.canned = [failure(429, "slow down", retry_after="0.0625")]
    with caplog.at_level(logging.INFO, "openai"):
        _ask()
    assert "in 0.062500 seconds" in caplog.text
    assert len(fake.requests) == 2


def test_a_timed_out_request_is_retried(fake: FakeEndpoint):
    fake.canned = [Canned(200, completion("late"), delay_seconds=1.5)]
    fake.always = Canned(200, completion("yes"))
    assert _ask(timeout_seconds=0.5, retries=1).text == "yes"


@pytest.mark.parametrize(
    ("canned", "error", "message"),
    [
        (failure(401, f"Incorrect API key provided: {KEY[:6]}***{KEY[-4:]}"), ConfigurationError, KEY_VARIABLE),
        (failure(403, f"not for {KEY}"), ConfigurationError, "refuses the key"),
        (failure(404, "The model `fake` does not exist"), ConfigurationError, "no model 'fake'.*does not exist"),
        (failure(400, "max_tokens is not supported"), RefusedError, "max_tokens is not supported.*autointerp.parameters"),
        (failure(429, f"out of quota, {KEY}", **SOON), SaeensError, r"out of quota, \*\*\*"),
        (failure(500, "on fire", **SOON), SaeensError, "on fire.*its answers so far are kept"),
        (Canned(200, completion("late"), delay_seconds=1.5), SaeensError, "timeout_seconds"),
        (Canned(200, completion("late"), trickle_seconds=0.1), SaeensError, "timeout_seconds"),
        (failure(400, "\x1b]0;title\x07\x1b[31mred\x1b[0m \x9b2Jcleared"), RefusedError, r"\(.*red cleared.*\)"),
    ],
)
def test_permanent_endpoint_errors_are_one_sentence_without_the_key(
    canned: Canned, error: type[SaeensError], message: str, fake: FakeEndpoint
):
    fake.always = canned
    with pytest.raises(error, match=message) as caught:
        _ask(timeout_seconds=0.5 if canned.delay_seconds or canned.trickle_seconds else 30, retries=0)
    assert type(caught.value) is error
    assert str(caught.value).isprintable()
    assert KEY not in str(caught.value) and KEY[-4:] not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None  # which Dagster would record


def test_an_answer_is_kept_without_what_a_terminal_would_execute(fake: FakeEndpoint):
    fake.always = Canned(200, completion("a\x1b[2J\x1b]8;;http://evil.example\x1b\\b\tc\n\x00\x1b"))
    assert _ask().text == "ab\tc\n"


def test_permanent_endpoint_errors_are_not_retried(fake: FakeEndpoint):
    fake.always = failure(401, "no")
    with pytest.raises(ConfigurationError):
        _ask(retries=5)
    assert len(fake.requests) == 1


def test_an_unreachable_endpoint_is_named_by_its_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL_VARIABLE, "http://me:hunter22222@127.0.0.1:9/v1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(SaeensError, match=r"http://127.0.0.1:9 cannot be reached") as caught:
        _ask(retries=0)
    assert "hunter" not in str(caught.value) and caught.value.__cause__ is None


def test_a_wrong_path_is_reported_with_the_usual_one(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL_VARIABLE, fake.url.removesuffix("/v1"))
    with pytest.raises(ConfigurationError, match="usually ends in /v1"):
        _ask()


@pytest.mark.parametrize(
    "body",
    [
        *(
            "",
            "<html>hello</html>",
            "{",
            "[]",
            "3",
            "null",
            "{}",
            '{"choices": []}',
            '{"choices": null}',
            '{"choices": [3]}',
            "[" * 100_000,
        ),
        '{"choices": [{"message": {"content": null}}], "usage": null}',
        '{"choices": [{"message": {"content": [1]}}], "usage": {"prompt_tokens": "x"}}',
    ],
    ids=lambda body: body[:60],
)
def test_bodies_that_are_no_completions_hold_no_text(body: str, fake: FakeEndpoint):
    fake.always = Canned(200, body)
    assert _ask() == Reply(None, False, 0, 0, body[:SHOWN_CHARACTERS])


def test_keys_and_invalid_characters_are_removed_from_answers(fake: FakeEndpoint):
    fake.always = Canned(200, completion(f"{KEY} \ud800 {base64.b64encode(b'x').decode()}"))
    assert _ask().text == "*** ? eA=="


# Many questions


def test_interview_scores_equal_those_of_the_rule(fake: FakeEndpoint, tmp_path: Path):
    verdicts = _run(_interviewer(tmp_path))
    for i, verdict in enumerate(verdicts):
        assert verdict is not None and verdict.score is not None and verdict.control is not None
        assert (verdict.status, verdict.explanation) == ("scored", f"begins with {'abcdef'[i]}")
        assert verdict.score == (1.0, 1.0, 0.0)
        assert verdict.control == (0.5, 0.0, 0.0)
    assert len(fake.requests) == 18


def test_concurrent_requests_stay_within_their_limit(fake: FakeEndpoint, tmp_path: Path):
    fake.canned = [Canned(200, completion("x"), delay_seconds=0.1)] * 9
    _run(_interviewer(tmp_path, requests_at_once=3), n=9)
    assert fake.most_at_once == 3


def test_stored_answers_are_not_requested_again(fake: FakeEndpoint, tmp_path: Path):
    first = _run(_interviewer(tmp_path))
    again = _interviewer(tmp_path)
    assert _run(again) == first
    assert (again.asked, again.from_disk, len(fake.requests)) == (0, 18, 18)


@pytest.mark.parametrize("changed", [{"model": "other"}, {"parameters": {"temperature": 1}}])
def test_a_changed_model_or_parameter_is_requested_again(changed: dict[str, Any], fake: FakeEndpoint, tmp_path: Path):
    _run(_interviewer(tmp_path))
    _run(_interviewer(tmp_path, **changed))
    assert len(fake.requests) == 36


def test_without_an_endpoint_only_stored_answers_are_available(fake: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = _run(_interviewer(tmp_path), n=4)
    monkeypatch.delenv(URL_VARIABLE)
    found = _run(_interviewer(tmp_path), n=6)  # the fourth has another control
    assert found == [*known[:3], None, None, None]
    assert len(fake.requests) == 12


def test_a_damaged_stored_answer_is_requested_again(fake: FakeEndpoint, tmp_path: Path):
    first = _run(_interviewer(tmp_path))
    files = sorted((tmp_path / FOLDER).glob("*/*.json"))
    for file, damage in zip(files, ["", "{", '{"answer": 3}', "[]", '{"answer": "[7]"}', b"\xff"], strict=False):
        file.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert _run(_interviewer(tmp_path)) == first
    assert 18 + 5 <= len(fake.requests) <= 18 + 6  # the fifth is an explanation, if that is what it is of


def test_the_estimate_equals_the_requests_sent(fake: FakeEndpoint, tmp_path: Path):
    interviewer = _interviewer(tmp_path, prices={"input": 2.0, "output": 8.0})
    estimate = interviewer.estimate(_subjects(6))
    _run(interviewer)
    assert (estimate.requests, estimate.known) == (interviewer.asked, 0)
    sent = sum(len(message["content"]) for request in fake.requests for message in request["messages"])
    assert sent / 3 <= estimate.tokens_in <= sent / 2
    assert estimate.price(interviewer.settings) == pytest.approx((estimate.tokens_in * 2 + estimate.tokens_out * 8) / 1e6)
    assert interviewer.estimate(_subjects(6)) == (0, 0, 0, 18)
    assert (interviewer.tokens_in, interviewer.tokens_out) == (1800, 180)


def test_an_unreadable_answer_is_requested_again_with_a_correction(fake: FakeEndpoint, tmp_path: Path):
    fake.canned = [Canned(200, completion("")), Canned(200, "<html>")]
    (verdict,) = _run(_interviewer(tmp_path, control=False, requests_at_once=1), n=1)
    assert verdict is not None and verdict.status == "scored"
    second, third = fake.requests[1:3]
    assert second["messages"][:2] == fake.requests[0]["messages"] and len(second["messages"]) == len(third["messages"]) == 4


@pytest.mark.parametrize("text", ["no idea", "[1]", "[1, 0, 1, 0, 1]", None])
def test_answers_that_stay_unreadable_are_recorded_as_malformed(text: str | None, fake: FakeEndpoint, tmp_path: Path):
    fake.rule = lambda question: rule(question) if question.explanation is None or question.explanation[-1] != "b" else text or ""
    interviewer = _interviewer(tmp_path)
    verdicts = _run(interviewer)
    assert [verdict.status for verdict in verdicts if verdict] == ["scored", "malformed answer", *["scored"] * 4]
    assert verdicts[1] == Verdict("malformed answer", "begins with b")
    assert verdicts[0] is not None and verdicts[0].score is not None and verdicts[0].control is None
    assert interviewer.malformed == 6
    asked = len(fake.requests)
    _run(_interviewer(tmp_path))
    assert len(fake.requests) == asked + 6  # these are asked again, and nothing else


def test_a_truncated_explanation_counts_as_none(fake: FakeEndpoint, tmp_path: Path):
    fake.canned = [Canned(200, completion("this goes on", "length"))] * 3
    interviewer = _interviewer(tmp_path, requests_at_once=1)
    first, second = _run(interviewer, n=2)
    assert first == Verdict("malformed answer")
    assert second is not None and second.status == "scored" and second.control is None


def test_an_endpoint_without_readable_answers_gets_no_further_requests(fake: FakeEndpoint, tmp_path: Path):
    fake.always = Canned(200, completion("cut", "length"))
    with pytest.raises(SaeensError, match=r"none of 20 answers can be read as explanations.*autointerp\.parameters"):
        _run(_interviewer(tmp_path), n=20)
    assert MALFORMED_AT_FIRST <= len(fake.requests) <= MALFORMED_AT_FIRST + 3


def test_unreadable_lists_are_requested_a_limited_number_of_times(fake: FakeEndpoint, tmp_path: Path):
    fake.rule = lambda question: rule(question) if question.explanation is None else "none of them"
    with pytest.raises(SaeensError, match=r"none of 20 answers can be read as lists of which texts fit\. The last was 'none of them'"):
        _run(_interviewer(tmp_path), n=20)
    assert len(list((tmp_path / FOLDER).glob("*/*.json"))) == 20
    assert len(fake.requests) <= 20 + MALFORMED_AT_FIRST + 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (completion("I would", "length"), "cut off after 'I would': allow more tokens in autointerp.parameters"),
        (completion(""), "'': try a model that follows instructions better, autointerp.model"),
        ("<html>\n a login page</html>", "no chat completion with a text but '<html> a login page</html>': check that the address"),
    ],
)
def test_a_small_interview_without_a_readable_answer_fails(body: str, message: str, fake: FakeEndpoint, tmp_path: Path):
    fake.always = Canned(200, body)
    with pytest.raises(SaeensError) as caught:
        _run(_interviewer(tmp_path), n=2)
    assert f"fake: of 2 features none is scored, since none of 6 answers can be read as explanations. The last was {message}" in str(
        caught.value
    )


def test_a_small_interview_with_explanations_alone_fails_and_keeps_them(fake: FakeEndpoint, tmp_path: Path):
    fake.rule = lambda question: rule(question) if question.explanation is None else "[1, 0]"
    with pytest.raises(SaeensError, match=r"of 2 features none is scored, since none of 6 answers can be read as lists.*'\[1, 0\]'"):
        _run(_interviewer(tmp_path), n=2)
    fake.rule, fake.requests = rule, []
    assert all(verdict and verdict.status == "scored" for verdict in _run(_interviewer(tmp_path), n=2))
    assert len(fake.requests) == 4  # two lists of each feature's own texts, and two for the control


def test_a_refusal_of_the_first_request_fails_and_later_refusals_are_recorded(fake: FakeEndpoint, tmp_path: Path):
    fake.canned = [failure(400, "no such parameter")]
    with pytest.raises(SaeensError, match="no such parameter"):
        _run(_interviewer(tmp_path, requests_at_once=1))
    fake.canned = [Canned(200, completion("begins with a")), failure(400, "a text that it does not like")]
    verdicts = _run(_interviewer(tmp_path, requests_at_once=1))
    assert [verdict.status for verdict in verdicts if verdict] == ["scored", "refused", *["scored"] * 4]


def test_answers_before_an_endpoint_failure_are_kept(fake: FakeEndpoint, tmp_path: Path):
    def until_down(question: Question) -> str:
        if len(fake.requests) == 9:
            fake.always = failure(500, "down")
        return rule(question)

    fake.rule = until_down
    with pytest.raises(SaeensError, match="down"):
        _run(_interviewer(tmp_path, requests_at_once=1))
    assert len(list((tmp_path / FOLDER).glob("*/*.json"))) == 9
    fake.always, fake.requests = None, []
    fake.rule = rule
    verdicts = _run(_interviewer(tmp_path))
    assert all(verdict and verdict.status == "scored" for verdict in verdicts)
    assert len(fake.requests) == 18 - 9


@pytest.mark.slow
def test_a_killed_interview_resumes_from_stored_answers(fake: FakeEndpoint, tmp_path: Path):
    here = Path(__file__).parent
    script = (
        f"import sys; sys.path.insert(0, {str(here)!r}); from pathlib import Path; import test_autointerp_endpoint as t; "
        f"t._run(t._interviewer(Path({str(tmp_path)!r})))"
    )
    child: list[subprocess.Popen[bytes]] = []

    def until_killed(question: Question) -> str:
        if len(fake.requests) == 11:
            child[0].send_signal(signal.SIGKILL)
            child[0].wait()
        return rule(question)

    fake.rule = until_killed
    child.append(subprocess.Popen([sys.executable, "-c", script]))
    assert child[0].wait() == -signal.SIGKILL
    answered = [json.loads(file.read_text()) for file in (tmp_path / FOLDER).glob("*/*.json")]
    assert 11 - 3 <= len(answered) <= 10 and all(each["answer"] for each in answered)
    fake.requests, fake.rule = [], rule
    assert all(verdict and verdict.status == "scored" for verdict in _run(_interviewer(tmp_path)))
    assert len(fake.requests) == 18 - len(answered)


def test_the_api_key_is_in_no_stored_answer_and_in_no_log_line(fake: FakeEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fake.rule = lambda question: f"{KEY} {rule(question)}"
    fake.canned = [failure(429, KEY, **SOON)]
    with caplog.at_level(logging.DEBUG):
        _run(_interviewer(tmp_path, retries=1))
    assert caplog.records
    assert KEY not in caplog.text
    files = list((tmp_path / FOLDER).glob("*/*.json"))
    assert len(files) == 18 and not any(KEY in file.read_text() for file in files)


def test_an_answer_that_cannot_be_written_leaves_no_file(fake: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saeens_pipeline.storage.disk.flush", full)
    with pytest.raises(OSError, match="No space left"):
        _run(_interviewer(tmp_path))
    assert not list((tmp_path / FOLDER).glob("*/*.json"))
