"""Corpora of conversations: texts and tokens as transformers writes them, recipes, and errors of records and templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_hub import FakeHub, reach
from pyarrow import parquet
from tiny_experiment import Laboratory, status_of
from tiny_gguf import tiny_llama, write_gguf
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from saeens_pipeline.assets import sources
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import chat_templates, corpora
from saeens_pipeline.language_models.chat_templates import read_chat_template
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.hub_datasets import HubCorpus
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.text_files import TextFileCorpus
from saeens_pipeline.language_models.tokens import open_tokens, write_tokens
from saeens_pipeline.settings.corpora import HubDataset, TextFiles
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.storage.names import Partition

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}\n{% endfor %}"
)
END = "<|endoftext|>"
CONVERSATIONS = [
    [{"role": "user", "content": f" What is {i} + {i}? "}, {"role": "assistant", "content": f"It is {2 * i}, \u00fc."}] for i in range(40)
]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template, and a tokenizer that begins every other text with the token of the beginning."""
    folder, embedded = tmp_path_factory.mktemp("chat_model"), describe_language_model(REFERENCE_MODEL).path
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(embedded / name)
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))])
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": {
            "content": END,
            "__type": "AddedToken",
            **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False),
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _copy(model: Path, folder: Path, **configuration: Any) -> Path:
    """A model to change: its files, with another tokenizer_config.json."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "tokenizer_config.json" or not configuration:
            (folder / file.name).symlink_to(file)
    if configuration:
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder


def _lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _corpus(folder: Path, model: Path, **fields: Any) -> TextFileCorpus:
    settings = TextFiles.model_validate({"messages_field": "messages", "test_share": 0.2} | fields, context={FILE: folder / "defs.yaml"})
    return TextFileCorpus(settings, template=read_chat_template(describe_language_model(str(model))))


# what is written


@pytest.mark.parametrize("file", ["a.jsonl", "a.parquet"])
def test_tokens_of_conversations_equal_those_of_transformers(chat_model: Path, tmp_path: Path, file: str):
    records = [{"chat": {"messages": each}, "kind": "sum"} for each in CONVERSATIONS]
    if file == "a.jsonl":
        (tmp_path / file).write_bytes(_lines(records))
    else:
        parquet.write_table(pa.Table.from_pylist(records), tmp_path / file)
    corpus = _corpus(tmp_path, chat_model, files=file, messages_field="chat.messages", label_fields=["kind"])
    description = describe_language_model(str(chat_model))
    write_tokens(
        tmp_path / "t", corpus, description, context_length=64, packing="document", drop=[], train_tokens=200, test_tokens=50
    )  # fmt: skip
    own = AutoTokenizer.from_pretrained(chat_model)
    (batch,) = open_tokens(tmp_path / "t").batches("train", 1000)
    documents = open_tokens(tmp_path / "t").documents("train")
    assert set(documents["kind"]) == {"sum"}
    for i, name in list(enumerate(documents["name"]))[:-1]:  # the last is cut
        expected = own.apply_chat_template(CONVERSATIONS[int(name.rsplit(":", 1)[1]) - 1], tokenize=True, return_dict=False)
        assert batch.tokens[batch.document == i].tolist() == expected
        assert expected.count(own.eos_token_id) == 3  # one at the beginning, not two, and two turns


def test_a_text_beside_conversations_still_gets_the_special_tokens_of_the_tokenizer(chat_model: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_lines([{"text": f"plain {i}"} for i in range(20)]))
    corpus = TextFileCorpus(TextFiles.model_validate({"files": str(tmp_path / "a.jsonl"), "test_share": 0.4}))
    write_tokens(
        tmp_path / "t", corpus, describe_language_model(str(chat_model)), context_length=64, packing="document", drop=[],
        train_tokens=10, test_tokens=5,
    )  # fmt: skip
    batch = next(open_tokens(tmp_path / "t").batches("train", 1))
    assert batch.tokens[0, 0] == Tokenizer.from_file(str(chat_model / "tokenizer.json")).token_to_id(END)


PLACES: dict[str, dict[str, Any]] = {
    "a text": {"chat_template": TEMPLATE},
    "several with names": {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_in_the_configuration_is_read_and_the_file_counts_more(chat_model: Path, tmp_path: Path, place: str):
    model = _copy(
        chat_model, tmp_path / "model", tokenizer_class="PreTrainedTokenizerFast", bos_token="<b>", eos_token="<e>", **PLACES[place]
    )
    (model / "chat_template.jinja").unlink()
    found = read_chat_template(describe_language_model(str(model)))
    written = found.write(CONVERSATIONS[1])
    assert written == AutoTokenizer.from_pretrained(model).apply_chat_template(CONVERSATIONS[1], tokenize=False)
    assert written == "<b><|user|>What is 1 + 1?<e>\n<|assistant|>It is 2, \u00fc.<e>\n"
    (model / "chat_template.jinja").write_text("{{ messages | length }}")
    assert read_chat_template(describe_language_model(str(model))).write(CONVERSATIONS[1]) == "2"


def test_the_date_in_a_template_is_the_same_on_every_day(chat_model: Path, tmp_path: Path):
    model = _copy(chat_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text("\n{{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}")
    assert read_chat_template(describe_language_model(str(model))).write(CONVERSATIONS[0]) == "\n26 Jul 2024, 2024-07-26"


def test_the_template_of_a_gguf_file_is_in_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_DATA", str(tmp_path / "data"))
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), change=lambda writer: writer.add_chat_template(TEMPLATE))
    description = describe_language_model(str(file))
    before = read_chat_template(description).identity
    assert not (tmp_path / "data").exists()
    found = read_chat_template(description)
    assert found.write(CONVERSATIONS[3]).count(END) == 3
    assert read_chat_template(description).identity == before  # with the folder of the dequantised model
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name).apply_chat_template(CONVERSATIONS[3], tokenize=False)
    assert found.write(CONVERSATIONS[3]) == expected


# recipes


def test_an_experiment_runs_on_conversations_and_notices_another_template(
    empty: Laboratory, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    model = _copy(chat_model, tmp_path / "model")
    source = {"language_model": str(model), "corpus": {"files": "a.jsonl", "messages_field": "messages", "test_share": 0.4}}
    file = empty.declare(source)
    (file.parent / "a.jsonl").write_bytes(_lines([{"messages": each} for each in CONVERSATIONS]))
    empty.materialise(["tiny/tokens"], Partition())
    recipe = empty.artefact("tokens", layer=None).recipe["settings"]
    assert recipe["chat_template"] == {**read_chat_template(describe_language_model(str(model))).identity}
    assert recipe["chat_template"]["special_tokens"] == {"bos_token": END, "eos_token": END}
    assert (recipe["corpus"]["messages_field"], "text_field" in recipe["corpus"]) == ("messages", False)
    assert {each.state for each in status_of() if each.declaration.address.name == "tokens"} == {"fresh"}
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert {each.state for each in status_of() if each.declaration.address.name == "tokens"} == {"stale"}


def test_a_template_changes_no_recipe_of_texts(empty: Laboratory, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    model = _copy(chat_model, tmp_path / "model")
    file = empty.declare({"language_model": str(model), "corpus": {"files": "a.jsonl"}})
    (file.parent / "a.jsonl").write_bytes(_lines([{"text": "x"}]))

    def recipe() -> dict[str, Any]:
        (tokens,) = (each for key, each in empty.declarations().items() if key.endswith("/tokens"))
        return {**tokens.partition_settings(Partition())}

    before = recipe()
    assert before.keys() == {"corpus", "tokenizer"}
    assert before["corpus"].keys() == {"text_field", "label_fields", "test_share", "corpus", "reader", "test_files", "files"}
    (model / "chat_template.jinja").unlink()
    assert recipe() == before


# the hub


def _data_set(**fields: Any) -> HubDataset:
    return HubDataset.model_validate({"name": "some-lab/chats", **fields})


def test_conversations_of_a_data_set_of_the_hub_are_written(
    chat_model: Path, fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("datasets", reason="the optional extra hub is not installed")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "README.md").write_text("A card.")
    (folder / "train.jsonl").write_bytes(_lines([{"messages": each} for each in CONVERSATIONS]))
    fake_hub.repositories["datasets/some-lab/chats"] = folder
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    reach(monkeypatch, fake_hub.url)
    template = read_chat_template(describe_language_model(str(chat_model)))
    corpus = HubCorpus(_data_set(messages_field="messages", test_share=1e-9), template=template)
    corpus.require_readable()
    assert [each.text for each in corpus.documents("train")] == [template.write(each) for each in CONVERSATIONS]
    with pytest.raises(SaeensError, match=r"data set some-lab/chats, train, record 1: there is no field 'turns'; there are: messages"):
        HubCorpus(_data_set(messages_field="turns"), template=template).require_readable()


def test_the_template_of_a_model_of_the_hub_is_downloaded_only_for_conversations(chat_model: Path, fake_hub: FakeHub):
    fake_hub.repositories["models/some-lab/model"] = chat_model
    description = describe_language_model("some-lab/model")
    assert not (description.path / "chat_template.jinja").exists()
    found = read_chat_template(description)
    assert (found.text, dict(found.special_tokens)) == (TEMPLATE, {"bos_token": END, "eos_token": END})
    assert found.identity == read_chat_template(describe_language_model(str(chat_model))).identity


# errors

GOOD = {"messages": CONVERSATIONS[0]}
RECORDS: dict[str, tuple[Any, str]] = {
    "no field": ({"text": "x"}, r"there is no field 'messages'; there are: text"),
    "a null": ({"messages": None}, r"field 'messages' is null, and it has to be a list of messages with role and content"),
    "a text": ({"messages": "Hello"}, r"field 'messages' is of type str, and it has to be a list of messages"),
    "an empty list": ({"messages": []}, r"field 'messages' is an empty list: a conversation has at least one message"),
    "a text as a message": ({"messages": ["Hello"]}, r"field 'messages' has of type str as message 1, and it has to be an object"),
    "other keys": ({"messages": [{"from": "human", "value": "x"}]}, r"has a message 1 whose role is missing; there are: from, value"),
    "no content": ({"messages": [*CONVERSATIONS[0], {"role": "user"}]}, r"has a message 3 whose content is missing; there are: role"),
    "a list as content": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        r"has a message 1 whose content is of type list, and it has to be a text",
    ),
    "a call of a tool": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
        r"has a message 1 with tool_calls, and calls of tools are not read",
    ),
    "a role": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "narrator", "content": "x"}]},
        r"field 'messages' is refused by the chat template of .*: no role narrator \(roles: user, narrator\)",
    ),
}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", RECORDS)
def test_a_wrong_conversation_is_named_by_file_line_and_field(chat_model: Path, tmp_path: Path, case: str, number: int):
    record, message = RECORDS[case]
    (tmp_path / "a.jsonl").write_bytes(_lines([*[GOOD] * (number - 1), record, GOOD]))
    with pytest.raises(SaeensError, match=rf"a\.jsonl:{number}: {message}" if "field" in message else rf"a\.jsonl:{number}: .*{message}"):
        list(_corpus(tmp_path, chat_model, files="a.jsonl", test_share=1e-9).documents("train"))


def test_a_file_without_records_has_no_conversations(chat_model: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(ConfigurationError, match=r"a\.txt: a whole text has no field 'messages': conversations are records of \.jsonl"):
        _corpus(tmp_path, chat_model, files="a.txt").require_readable()


@pytest.mark.parametrize("template", ["{% for message in messages %}", "{{ nothing.of_this }}"])
def test_a_template_that_does_not_work_is_named(chat_model: Path, tmp_path: Path, template: str):
    model = _copy(chat_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(template)
    (tmp_path / "a.jsonl").write_bytes(_lines([GOOD]))
    with pytest.raises(SaeensError, match=r"chat template of .*model"):
        _corpus(tmp_path, model, files="a.jsonl").require_readable()


def test_a_model_without_a_template_is_refused_with_the_line_before_anything_is_written(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    file = empty.declare({"corpus": {"files": "a.jsonl", "messages_field": "messages"}})
    (file.parent / "a.jsonl").write_bytes(_lines([GOOD] * 100))
    line = file.read_text().splitlines().index("  corpus:") + 1
    with pytest.raises(
        ConfigurationError, match=rf"{file}:{line}: attributes.corpus: messages_field needs a chat template, and .* has none"
    ):
        empty.run()
    assert not list(empty.root.rglob("recipe.json"))


def test_a_role_that_the_template_refuses_ends_a_run_before_anything_is_written(
    empty: Laboratory, chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    file = empty.declare({"language_model": str(chat_model), "corpus": {"files": "a.jsonl", "messages_field": "messages"}})
    (file.parent / "a.jsonl").write_bytes(_lines([{"messages": [{"role": "narrator", "content": "x"}]}]))
    with pytest.raises(SaeensError, match=r"a\.jsonl:1: field 'messages' is refused by the chat template .*: no role narrator"):
        empty.run()
    assert not list(empty.root.rglob("recipe.json"))


def test_a_text_and_a_conversation_exclude_each_other(empty: Laboratory):
    empty.declare({"corpus": {"files": "a.jsonl", "messages_field": "messages", "text_field": "text"}})
    (complaint,) = empty.catalogue.broken.values()
    assert "attributes.corpus: text_field and messages_field exclude each other" in complaint


def test_importing_loads_no_transformers():
    assert "transformers" not in vars(chat_templates)
