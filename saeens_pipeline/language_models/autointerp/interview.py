"""Concurrent requests to a language model about many features, without those whose answers are on disk."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from anyio.from_thread import start_blocking_portal

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.autointerp.answers import Answers
from saeens_pipeline.language_models.autointerp.endpoint import SHOWN_CHARACTERS, Client, Endpoint, RefusedError, Reply
from saeens_pipeline.language_models.autointerp.protocol import (
    EXPLANATION_TOKENS,
    Examples,
    Messages,
    Question,
    ask_again,
    ask_to_detect,
    ask_to_explain,
)

if TYPE_CHECKING:
    from saeens_models.metrics import DetectionScore
    from saeens_pipeline.progress import Advance
    from saeens_pipeline.settings.autointerp import AutoInterpSettings

SCORED, MALFORMED, REFUSED = "scored", "malformed answer", "refused"
_NOT_ASKED = "not asked"
ATTEMPTS = 3  # per question, to get a readable answer
MALFORMED_AT_FIRST = 20  # unreadable answers to one kind of question, without a readable one, after which the run fails
CHARACTERS_PER_TOKEN = 3  # most tokenizers have more, so that estimates of tokens are high rather than low
_WAKE_SECONDS = 0.25  # the system may deliver a signal to another thread; the main thread handles it when it wakes

_S = TypeVar("_S")
_T = TypeVar("_T")
_EXAMPLE_EXPLANATION = "x" * (EXPLANATION_TOKENS * CHARACTERS_PER_TOKEN)


class FeatureTexts(NamedTuple):
    """A feature: its texts, and the index of the subject whose explanation is its control, or None."""

    examples: Examples
    other: int | None


class Verdict(NamedTuple):
    """Result for a feature. `control` is the score with another feature's explanation."""

    status: str
    explanation: str | None = None
    score: DetectionScore | None = None
    control: DetectionScore | None = None


class Estimate(NamedTuple):
    """Estimated requests and tokens without an answer yet, and the number of known answers.

    Assumes a typical length of explanations, and no reasoning before an answer.
    """

    requests: int
    tokens_in: int
    tokens_out: int
    known: int

    @classmethod
    def of(cls, pending: Collection[Question[Any]], known: int) -> Estimate:
        """Return the estimate for `pending` questions."""
        characters = sum(len(message["content"]) for question in pending for message in question.messages)
        return cls(len(pending), characters // CHARACTERS_PER_TOKEN, sum(question.tokens for question in pending), known)

    @classmethod
    def beforehand(cls, settings: AutoInterpSettings, n_features: int, n_contexts: int, context_tokens: int) -> Estimate:
        """Return the estimate for features with all their contexts, before the contexts exist."""
        texts = ["x" * (context_tokens * CHARACTERS_PER_TOKEN)] * (n_contexts // 2)
        detect = ask_to_detect(_EXAMPLE_EXPLANATION, 2 * texts)
        one = cls.of([ask_to_explain(texts), *[detect] * (2 if settings.control else 1)], known=0)
        return cls(*(amount * n_features for amount in one))

    def price(self, settings: AutoInterpSettings) -> float | None:
        """Return the price of the estimated tokens, in the currency of `prices`; None without prices."""
        prices = settings.prices
        return None if prices is None else (self.tokens_in * prices.input + self.tokens_out * prices.output) / 1e6

    def in_words(self, settings: AutoInterpSettings) -> str:
        """Return for example `1,200 requests, about 480,000 tokens sent and 42,000 received, 0.10 at the given prices`."""
        price = self.price(settings)
        costs = "" if price is None else f", {price:,.2f} at the given prices"
        sent, received = (f"{float(f'{tokens:.3g}'):,.0f}" for tokens in (self.tokens_in, self.tokens_out))
        return f"{self.requests:,} requests, about {sent} tokens sent and {received} received{costs}"


class _Unanswered(str):
    """The reason for a missing answer."""


@dataclass
class Interviewer:
    """Asks one model about features; without an endpoint it uses only the answers on disk."""

    settings: AutoInterpSettings
    answers: Answers
    endpoint: Endpoint | None
    asked: int = 0
    from_disk: int = 0
    malformed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    _client: Client | None = field(default=None, repr=False)
    _read: Counter[str] = field(default_factory=Counter, repr=False)  # answers by kind of question
    _unread: Counter[str] = field(default_factory=Counter, repr=False)
    _last_unread: dict[str, Reply] = field(default_factory=dict, repr=False)

    def estimate(self, subjects: Sequence[FeatureTexts]) -> Estimate:
        """Return the number of requests and tokens for these features. Features with equal texts (member 1, round 1) count once."""
        explanations = [self._find(ask_to_explain(each.examples.shown)) for each in subjects]
        pending: dict[object, Question[Any]] = {}
        known: set[object] = set()
        for number, subject in enumerate(subjects):
            shown, texts, _ = subject.examples
            if explanations[number] is None:
                pending[shown] = ask_to_explain(shown)
            else:
                known.add(shown)
            for explained in [number] if subject.other is None else [number, subject.other]:
                explanation, asked = explanations[explained], (subjects[explained].examples.shown, texts)
                question = ask_to_detect(explanation or _EXAMPLE_EXPLANATION, texts)
                if explanation and self._find(question) is not None:
                    known.add(asked)
                else:
                    pending[asked] = question
        return Estimate.of(pending.values(), len(known))

    def interview(self, subjects: Sequence[FeatureTexts], advance: Advance) -> list[Verdict | None]:
        """Return the verdict on each subject; None if an answer is missing and there is no endpoint. `advance` counts questions.

        Raises SaeensError for failures that further requests would repeat, and if no feature is scored because answers are unreadable; the
        answers so far stay on disk. The event loop runs in a thread of its own: there an interrupt would look like a broken connection;
        in this thread it cancels the requests.
        """
        with start_blocking_portal() as portal:
            verdicts = portal.start_task_soon(self._interview, subjects, advance)
            while not verdicts.done():
                futures.wait([verdicts], _WAKE_SECONDS)
            found = verdicts.result()
        statuses = {verdict.status for verdict in found if verdict}
        if MALFORMED in statuses and SCORED not in statuses:
            kind = max(self._unread, key=lambda each: self._unread[each])
            raise self._unreadable(kind, f"of {len(found):,} features none is scored, since ")
        return found

    async def _interview(self, subjects: Sequence[FeatureTexts], advance: Advance) -> list[Verdict | None]:
        self._client = Client(self.endpoint, self.settings.timeout_seconds, self.settings.retries) if self.endpoint else None

        async def explain(subject: FeatureTexts) -> str | _Unanswered:
            return await self._attempt(ask_to_explain(subject.examples.shown), advance)

        async def detect(subject: FeatureTexts, explanation: str | _Unanswered) -> DetectionScore | _Unanswered:
            from saeens_models.metrics import detection_score

            if isinstance(explanation, _Unanswered):
                advance(1, before=self._client is None)
                return explanation
            said = await self._attempt(ask_to_detect(explanation, subject.examples.texts), advance)
            return said if isinstance(said, _Unanswered) else detection_score(said, subject.examples.fires)

        async def judge(number: int) -> Verdict | None:
            subject, own = subjects[number], explanations[number]
            score = await detect(subject, own)
            if subject.other is None or isinstance(score, _Unanswered):
                control = None
                advance(subject.other is not None, before=self._client is None)
            else:
                control = await detect(subject, explanations[subject.other])
            failure = next((each for each in (own, score, control) if isinstance(each, _Unanswered)), None)
            if failure == _NOT_ASKED:
                return None
            return Verdict(
                str(score) if isinstance(score, _Unanswered) else SCORED,
                None if isinstance(own, _Unanswered) else own,
                None if isinstance(score, _Unanswered) else score,
                None if isinstance(control, _Unanswered) else control,
            )

        try:
            explanations = await self._in_turns(explain, subjects)
            return await self._in_turns(judge, range(len(subjects)))
        finally:
            if self._client:
                await self._client.close()

    async def _attempt(self, question: Question[_T], advance: Advance) -> _T | _Unanswered:
        """Return the parsed answer, from disk or from the endpoint, or the reason for a missing one."""
        known = self._find(question)
        if known is not None:
            self.from_disk += 1
        elif self._client is None:
            known = _Unanswered(_NOT_ASKED)
        else:
            answer = await self._ask(self._client, question)
            advance(1)
            return answer
        advance(1, before=True)
        return known

    async def _ask(self, client: Client, question: Question[_T]) -> _T | _Unanswered:
        """Ask until an answer is readable, at most ATTEMPTS times; complain about unreadable ones. Keeps a readable answer."""
        request = original = self._request(question.messages)
        for _ in range(ATTEMPTS):
            try:
                reply = await client.ask(request)
            except RefusedError:
                if self._read.total() + self.from_disk == 0:
                    raise
                return _Unanswered(REFUSED)
            self.asked += 1
            self.tokens_in += reply.tokens_in
            self.tokens_out += reply.tokens_out
            value = None if reply.text is None or reply.is_cut_off else question.read(reply.text)
            if reply.text is not None and value is not None:
                self._read[question.kind] += 1
                date = datetime.now(UTC).isoformat(timespec="seconds")
                self.answers.keep(original, reply.text, tokens_in=reply.tokens_in, tokens_out=reply.tokens_out, date=date)
                return value
            self.malformed += 1
            self._unread[question.kind] += 1
            self._last_unread[question.kind] = reply
            if self._unread[question.kind] >= MALFORMED_AT_FIRST and not self._read[question.kind]:
                raise self._unreadable(question.kind)
            request = self._request(ask_again(question.messages, reply.text, question.complaint))
        return _Unanswered(MALFORMED)

    def _unreadable(self, kind: str, why: str = "") -> SaeensError:
        reply, unread, read = self._last_unread[kind], self._unread[kind], self._read[kind]
        said = repr(reply.excerpt if reply.text is None else " ".join(reply.text.split())[:SHOWN_CHARACTERS])
        if reply.is_cut_off:
            found, remedy = f"cut off after {said}", "allow more tokens in autointerp.parameters, which a model that thinks needs"
        elif reply.text is None:
            found, remedy = f"no chat completion with a text but {said}", "check that the address is an endpoint of OpenAI's protocol"
        else:
            found, remedy = said, "try a model that follows instructions better, autointerp.model"
        which = f"{unread:,} of {unread + read:,} answers cannot" if read else f"none of {unread:,} answers can"
        return SaeensError(
            f"{self.settings.model}: {why}{which} be read as {kind}. The last was {found}: {remedy}. Readable answers are kept and not "
            "asked for again"
        )

    def _request(self, messages: Messages) -> dict[str, Any]:
        return {"model": self.settings.model, "messages": messages, **self.settings.parameters}

    def _find(self, question: Question[_T]) -> _T | None:
        answer = self.answers.find(self._request(question.messages))
        return None if answer is None else question.read(answer)

    async def _in_turns(self, work: Callable[[_S], Awaitable[_T]], items: Sequence[_S]) -> list[_T]:
        """Return the results of `work` for all items, `requests_at_once` at a time. The first failure cancels the others."""
        free = asyncio.Semaphore(self.settings.requests_at_once)

        async def take(item: _S) -> _T:
            async with free:
                return await work(item)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(take(item)) for item in items]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]
