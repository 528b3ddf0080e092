"""Mutated experiment files: each is read or answered with file and line, in time, and in the project's own words."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pydantic_core._pydantic_core import list_all_errors
from tiny_experiment import experiment_file, experiment_settings, source_settings

from saeens_models.architectures import architectures, settings_class
from saeens_pipeline import defs
from saeens_pipeline.assets import catalogue
from saeens_pipeline.assets.catalogue import Experiments
from saeens_pipeline.settings import messages
from saeens_pipeline.settings.files import MODELS

FOREIGN_WORDS = re.compile(
    r"pydantic|Input should|a valid (string|integer|number|boolean|list|dictionary|tuple)|Field required|Value error|validation error|"
    r"unable to (parse|interpret)|Extra inputs|could not determine|"
    r"expected a mapping or list of mappings for merging|Traceback"
)
MOST_SECONDS, MOST_CHARACTERS = 2.0, 2000

EVERYTHING = experiment_file(
    ("ActivationSource", source_settings("some/model", corpus={"files": ["a/*.jsonl", "b.txt"], "label_fields": ["kind"]})),
    (
        "EnsembleExperiment",
        experiment_settings(
            sae=[{"architecture": "topk", "expansion": 2, "k": 4}] * 3,
            ensemble={"members": 3, "seeds": [1, 2], "specialised": [{"member": 2, "documents": {"language": ["python"]}}]},
            baselines=["expanded"],
            baseline_training={"expanded": {"learning_rate": 0.1}},
            freshness={"fail_days": 7, "warn_days": 1},
            schedule="0 3 * * 0",
            concept_detection={"datasets": ["builtin/language", {"name": "mine", "train": "x.jsonl", "labels": ["a", 1]}]},
            spurious_correlation={"datasets": [{"name": "own", "train": "x.csv", "target": ["a", "b"], "spurious": ["c", "d"]}]},
            autointerp={"model": "m", "parameters": {"temperature": 0}, "prices": {"input": 1, "output": 2}},
            checks={"min_explained_variance": 0.5},
        ),
    ),
)
SWEEP = experiment_file(("EnsembleExperiment", experiment_settings(sweep={"k": [2, 4]}, baselines=None)))
FOLLOWING = experiment_file(
    ("ActivationSource", source_settings("", language_model={"each": "checkpoints/step-*"})),
    ("ActivationSource", source_settings("some/model", name="hub", revisions=["step1", "step2"])),
    ("EnsembleExperiment", experiment_settings(source="hub")),
)
TEXTS = [EVERYTHING, SWEEP, FOLLOWING, *(file.read_text() for root in defs.__path__ for file in sorted(Path(root).rglob("defs.yaml")))]

BOMB = "&a0 [x, x]\n" + "\n".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
VALUES = [
    "", "~", "0", "-1", "1e6", "1e-5", "1.5", ".inf", "-.inf", ".nan", "9" * 4300, "-" + "9" * 30, "0x" + "f" * 5000, "1:2:3" * 9,
    "010", "1_000", "2024-02-30", "2024-02-03", "2024-13-01 99:99:99", "!!bool maybe", "!!int x", "!!float y", "!!null z",
    "!!timestamp t", "!!binary '*'", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str [a]", "!!map [a]", "!!seq {a: 1}",
    "!!python/name:os.system", "!unknown x", "!<x> y", "[]", "{}", "[[]]", "[{}]", "[~]", "[1, a, [b]]", "{a: 1}", "{a: {b: {c: d}}}",
    "{1: 2}", "{~: 1}", "{true: 1}", "{[a]: b}", "{? {a: b} : c}", "true", "yes", "off", "'true'", "a" * 5000, "'" + "b" * 70 + "'",
    "a" * 64, '"\\e[31m"', '"\\0"', '"\\ud800"', '"\\n\\n"', "ü", "日本", "*x", "&x y", "&x [*x]", "&x {a: *x}", BOMB,
    "[" * 40 + "]" * 40, "[" * 5000, "{a: " * 500, "- " * 300, "|", ">-\n   text", "{<<: {a: 1}}", "<<", "@daily", "0 0 30 2 *",
    "* * * * * *", "'*/0 * * * *'", "'0-999999999 * * * *'", "@reboot", "builtin/reference", "../x", "/dev/zero", "topk", "standard",
    "jumprelu", "gated", "batch_topk", "{files: 3}", "{files: []}", "{name: [a]}", "{name: 'a/b', files: c}", "[true, false]",
    "{architecture: topk}", "{architecture: [topk]}", "{k: [1, 1]}", "{k: []}", "{k: 3}", "{l1_coefficient: [1.0e-300]}",
    "{k: [1000000000000000000000000000]}", "{k: [a]}", "all", "[all]", "[expanded, wide]", "{expanded: 3}", "{wide: {}}",
]  # fmt: skip
BYTES = [
    b"\x00", b"\xff", b"\xc3", b"\x1b[0m", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\t", b"\r", b"\xc2\x85", b"\xe2\x80\xa8", b"%", b"---\n",
    b"...\n", b"'", b'"', b"{", b"}", b"[", b"]", b":", b"#", b"&a ", b"*a ", b"? ", b"! ", b"|", b">", b"\n", b"- ",
]  # fmt: skip


def _line(text: str, chance: random.Random, change: Callable[[str], str]) -> str:
    lines = text.splitlines() or [""]
    i = chance.randrange(len(lines))
    lines[i] = change(lines[i])
    return "\n".join(lines)


def _value(text: str, chance: random.Random) -> str:
    """Replace one value, in a block or inside brackets."""
    places = [found.span(1) for found in re.finditer(r"(?:[:,\[] |\[|- )([^\s,\[\]{}#:][^,\[\]{}#\n]*)", text)]
    start, end = chance.choice(places or [(0, len(text))])
    return text[:start] + chance.choice(VALUES) + text[end:]


def _rest(line: str, value: str) -> str:
    return f"{line.split(':', 1)[0]}: {value}"


def _misspell(word: str, chance: random.Random) -> str:
    i = chance.randrange(len(word))
    return chance.choice([word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + "x" + word[i + 1 :], word.upper()])


def _key(text: str, chance: random.Random) -> str:
    places = [found.span(1) for found in re.finditer(r"(\w+): ?", text)]
    start, end = chance.choice(places or [(0, len(text))])
    new = chance.choice([_misspell(text[start:end], chance), "x" * 3000, '"\\e"', "1", "true", "~", "[a]", "<<", "name"])
    return text[:start] + new + text[end:]


def _bytes(text: str, chance: random.Random) -> bytes:
    content, i = text.encode(), chance.randrange(len(text))
    return content[:i] + chance.choice(BYTES) + content[i + chance.randrange(3) :]


MUTATIONS: list[Callable[[str, random.Random], str | bytes]] = [
    _value,
    _value,
    _key,
    lambda text, chance: _line(text, chance, lambda line: _rest(line, chance.choice(VALUES))),
    lambda text, chance: _line(text, chance, lambda line: f"{line}\n{line}"),
    lambda text, chance: _line(text, chance, lambda line: ""),
    lambda text, chance: _line(text, chance, lambda line: f"{' ' * chance.randrange(4)}{line}"),
    lambda text, chance: _line(text, chance, lambda line: line.strip()),
    lambda text, chance: _line(text, chance, lambda line: f"{line}{' ' if chance.random() < 0.5 else ''}{chance.choice(VALUES)}"),
    lambda text, chance: text[: chance.randrange(len(text))],
    lambda text, chance: text + chance.choice(["\n---\n", "\n...\n", "\n--- x", "\n---\n- a\n", "\n" + text]),
    _bytes,
    _bytes,
]


def _mutated(seed: int) -> bytes:
    chance = random.Random(seed)
    text: str | bytes = chance.choice(TEXTS)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if isinstance(text, str) and text:
            text = chance.choice(MUTATIONS)(text, chance)
    return text if isinstance(text, bytes) else text.encode(errors="surrogatepass")


def _complaint(file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the message about a file; empty for one that is read. Fails for foreign errors, slow answers and messages without a line."""
    file.write_bytes(content)
    monkeypatch.setattr(catalogue, "find_files", lambda: [file])
    began = time.process_time()
    found = Experiments.load()
    seconds = time.process_time() - began
    complaint = found.broken.get(file, "")
    assert seconds < MOST_SECONDS, (seconds, complaint[:200])
    for line in complaint.splitlines():
        assert re.match(rf"{re.escape(str(file))}:\d+: ", line), line
        assert len(line) < MOST_CHARACTERS + len(str(file)), len(line)
        assert line.isprintable(), line
        assert not FOREIGN_WORDS.search(line), line
        assert int(line.removeprefix(f"{file}:").split(":")[0]) <= len(re.split(rb"\r\n|[\r\n]|\xc2\x85|\xe2\x80[\xa8\xa9]", content))
    return complaint


def _campaign(seeds: range, file: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    answers = Counter[str]()
    for seed in seeds:
        try:
            complaint = _complaint(file, _mutated(seed), monkeypatch)
        except Exception as error:
            error.add_note(f"mutation {seed}")
            raise
        answers["refused" if complaint else "read"] += 1
    return answers


# by kind of pydantic's schema: the errors that a value of a file can cause there
ERRORS = {
    "str": ("string_type", "string_unicode", "string_too_short", "string_too_long", "string_pattern_mismatch"),
    "int": ("int_type", "int_parsing", "int_parsing_size", "int_from_float", "greater_than", "greater_than_equal", "less_than",
            "less_than_equal", "multiple_of", "finite_number"),
    "float": ("float_type", "float_parsing", "finite_number"),
    "bool": ("bool_type", "bool_parsing"),
    "list": ("list_type", "too_short", "too_long"),
    "tuple": ("tuple_type", "too_short", "too_long", "missing", "extra_forbidden"),
    "dict": ("dict_type", "invalid_key", "too_short", "too_long"),
    "model": ("model_type", "model_attributes_type"),
    "model-fields": ("model_attributes_type", "extra_forbidden", "missing"),
    "default": ("default_factory_not_called",),
    "literal": ("literal_error",),
    "tagged-union": ("union_tag_invalid", "union_tag_not_found"),
    "nullable": ("none_required",),
    "definition-ref": ("recursion_loop",),
}  # fmt: skip
PLAIN = {"model-field", "function-after", "function-before", "function-wrap", "with-info", "no-info", "union", "any", "definitions"}


def _kinds(schema: object) -> set[str]:
    """Return the kinds of all parts of a schema of pydantic."""
    if isinstance(schema, Mapping):
        kind = schema.get("type")
        return {kind for kind in (kind,) if isinstance(kind, str)}.union(*map(_kinds, schema.values()))
    return set().union(*map(_kinds, schema)) if isinstance(schema, (list, tuple)) else set()


def test_every_error_of_a_field_has_words_of_our_own():
    models = [*MODELS.values(), *map(settings_class, architectures())]
    kinds = set().union(*(_kinds(model.__pydantic_core_schema__) for model in models))
    assert kinds <= ERRORS.keys() | PLAIN
    assert {each for kind in kinds & ERRORS.keys() for each in ERRORS[kind]} <= messages._MESSAGES.keys()
    for each in list_all_errors():
        error = {"type": each["type"], "msg": each["example_message_python"], "ctx": each.get("example_context") or {}, "input": 1}
        if each["type"] not in messages._OWN:
            said = messages.in_words(error)
            assert said
            assert not said.startswith(("Input should", "Field required", "Unable", "Value should")), said
            assert each["example_message_python"] not in said


def test_mutated_files_are_read_or_answered_with_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = _campaign(range(150), tmp_path / "a.yaml", monkeypatch)
    assert min(answers["read"], answers["refused"]) > 10


@pytest.mark.slow
def test_twenty_thousand_mutated_files_are_read_or_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    answers = _campaign(range(1000, 21_000), tmp_path / "a.yaml", monkeypatch)
    with capsys.disabled():
        print(f"\n20,000 mutations: {answers['read']:,} read, {answers['refused']:,} refused with file and line")


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_no_value_of_a_field_is_answered_with_a_foreign_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str):
    attributes = f"sae: {value}\n  seeds: {value}\n  {value}: 1\n"
    for text in (f"type: saeens_pipeline.components.EnsembleExperiment\nattributes:\n  {attributes}", value):
        _complaint(tmp_path / "a.yaml", text.encode(errors="surrogatepass"), monkeypatch)


def test_a_language_model_with_a_name_too_long_for_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = next(text for text in TEXTS if "language_model: builtin/reference" in text)
    text = text.replace("language_model: builtin/reference", f"language_model: {'a' * 300}")
    assert not _complaint(tmp_path / "a.yaml", text.encode(), monkeypatch)
