"""Dequantisation of GGUF files by transformers, once, into a folder in transformers' format."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from saeens_pipeline.errors import ConfigurationError, SaeensError, counted
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.gguf_models import cache_folder, lock_name, read_header
from saeens_pipeline.language_models.models import quiet_transformers
from saeens_pipeline.storage import locks
from saeens_pipeline.storage.disk import is_full_disk, require_free_disk, writes_nothing
from saeens_pipeline.storage.recipes import Store, write_plain_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def dequantise(description: LanguageModelDescription) -> None:
    """Write the folder of a GGUF model, unless it exists: config.json, float32 weights, and tokenizer. Other models have none.

    It appears whole or not at all. Other processes wait for the first. Memory: the float32 weights, twice while one tensor is converted.
    Does nothing where nothing is written (`writing_nothing`).
    Raises ConfigurationError for a model that transformers cannot load, SaeensError for a data root that cannot be written or is too small,
    and for a file that is replaced meanwhile.
    """
    file, folder = description.gguf_file, description.path
    if file is None or folder.is_dir() or writes_nothing():
        return
    root = folder.parent.parent
    Store(root).require_writable()
    with locks.holding(root, lock_name(folder)):
        if folder.is_dir():
            return
        require_free_disk(root, 4 * read_header(description.name, file).n_parameters, f"{description.name}, dequantised to float32,")
        logger.info("dequantising %s into %s, once", file, folder)
        with write_plain_folder(folder) as aside:
            _write(description, file, aside)
            if cache_folder(file) != folder:
                raise SaeensError(f"{file} was replaced while it was dequantised: run again")


def read_gguf_config(description: LanguageModelDescription) -> PretrainedConfig:
    """Return the configuration of a GGUF model. Raises ConfigurationError for an architecture that transformers cannot load."""
    from transformers import AutoConfig

    assert description.gguf_file is not None
    if (description.path / "config.json").is_file():
        return AutoConfig.from_pretrained(description.path, local_files_only=True, trust_remote_code=False)
    with _explained(description), _alone(description.gguf_file) as place:
        return AutoConfig.from_pretrained(**place)


def _write(description: LanguageModelDescription, file: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _explained(description), _alone(file) as place:
        config = AutoConfig.from_pretrained(**place)
        AutoTokenizer.from_pretrained(**place, config=config).save_pretrained(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError("its tokenizer cannot be written as tokenizer.json")
        # Weights may be left in blocks where a kernel is installed. Older versions of transformers always dequantise.
        whole: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):
            whole = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        loaded = AutoModelForCausalLM.from_pretrained(
            **place, **whole, config=copy.deepcopy(config), dtype=torch.float32, output_loading_info=True
        )
        quantised, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
        if missing := sorted(report["missing_keys"]):  # transformers would initialise them randomly
            raise ValueError(f"it lacks {counted(len(missing), 'tensor')} that its header asks for: {missing[0]}, ...")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.load_state_dict(quantised.state_dict(), assign=True)  # save_pretrained() refuses a model that was quantised
        model.tie_weights()
        model.save_pretrained(folder)
        for each in folder.iterdir():  # safetensors writes for its owner alone; a data root may have several users
            each.chmod((folder / "config.json").stat().st_mode & 0o777)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[dict[str, Any]]:
    """Yield arguments of from_pretrained() for a GGUF file in a folder without other files, which transformers would read, too."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(file)
        place = {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
            yield place


@contextlib.contextmanager
def _explained(description: LanguageModelDescription) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, and what a wrong header leads to
        if is_full_disk(error) or isinstance(error, MemoryError):
            raise
        raise ConfigurationError(
            f"transformers cannot load {description.gguf_file} (architecture {description.model_type}) as a causal language model: "
            f"{' '.join(str(error).split())[:500] or type(error).__name__}"
        ) from error
