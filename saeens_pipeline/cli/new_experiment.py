"""Experiment files for `saeens new`: the model's sizes are filled in, and every field has a comment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import ValidationError

from saeens_pipeline import defs
from saeens_pipeline.assets.saes import validate_targets
from saeens_pipeline.assets.sources import validate_source
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.descriptions import LanguageModelDescription, validate_hook
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.orchestration.catalogue import load_catalogue
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.settings.files import FOLDERS_VARIABLE, find_files, own_folders
from saeens_pipeline.storage.names import validate_name

HOOK = "resid_post"
MAX_CONTEXT_LENGTH = 2048  # longer windows cost memory and add little
TRAIN_TOKENS, TEST_TOKENS = 1_000_000, 50_000
EXPANSION = 8
DIMENSIONS_PER_FEATURE = 24  # d_in / k, about that of the quickstart; k is rounded to a power of two

_TEMPLATE = """\
# {name}: ensembles of SAEs on {model}
# {facts}.
# `saeens run {name}` makes everything; `saeens experiments` shows errors of this file with their lines.
type: saeens_pipeline.components.ActivationSource
attributes:
  name: {name} # lower-case letters, digits and _
  language_model: {language_model} # builtin/reference, a folder in transformers' format, a model's name on the hub, transformer_lens:NAME
  revision: main # branch, tag or commit of a model on the hub
  # language_model_dtype: bfloat16 # dtype of the language model's computation; default float32
  weights: trained # random: the same architecture, untrained, for a control, which needs its own source
  corpus: builtin/installed_packages # or {{name: DATASET, split: train}} on the hub, or {{files: "texts/*.jsonl.zst", text_field: text}}
  hook: {hook} # resid_pre, resid_mid, resid_post, mlp_out, attn_out, or a module path with {{layer}}
  layers: [{layers}] # 0 to {last_layer}; one forward pass serves all missing layers
  context_length: {context_length} # tokens of a window; at most {max_context_length} for this model
  packing: {packing} # document: windows inside one document; concatenate: windows across documents
  # windows_per_document: 2 # for packing: document, the largest number of windows per document, spread evenly
  drop: [first] # positions without a row: first (position 0, often an attention sink), special, padding
  train_tokens: {train_tokens:_} # activation rows for training: {gigabytes:.2g} GB of disk for each layer
  test_tokens: {test_tokens:_} # activation rows of held-out documents, for evaluation
  dtype: float16 # of stored activations; bfloat16 or float32 for values beyond 65504
---
type: saeens_pipeline.components.EnsembleExperiment
attributes:
  name: {name}
  source: {name}
  sae:
    architecture: topk # or standard, jumprelu
    expansion: {expansion} # features per dimension: d_sae = {expansion} * {d_model} = {d_sae:_}; or set d_sae instead
    k: {k} # features that fire per token; `sae` may also be a list of such configurations, one per member
  # sweep: {{k: [16, 32, 64]}} # an experiment for each value of one field of sae; `saeens pareto {name}` compares them
  training:
    learning_rate: 1.0e-3 # larger for short trainings: the quickstart uses 7e-3
    learning_rate_warmup_fraction: 0.05
    learning_rate_decay_fraction: 0.2
    batch_tokens: 1024 # tokens per step
    dead_after_tokens: {dead_after_tokens:_} # a feature that does not fire for longer counts as dead
    unit_norm_decoder: true # feature directions keep norm 1
    normalize_activations: expected_average_only_in # train at mean norm sqrt(d_in); saved SAEs take unscaled activations
  ensemble:
    members: 8 # SAEs of an ensemble
    seeds: [42, 43] # everything is repeated for each seed; stability compares seeds
    boosting: sequential # concurrent: all rounds in one pass, in half the time, with slightly worse results
    # specialised: [{{member: 2, documents: {{language: [python]}}, start_from: 1}}] # a member on a part of the corpus
  baselines: [expanded, expanded_l0_matched] # one SAE as wide as an ensemble: with a member's L0, with the ensemble's L0
  # also compute_matched: a member's width, trained as long as all members; matching_pursuit: as wide as all members, slow
  # baseline_training: {{matching_pursuit: {{batch_tokens: 8192}}}} # fields of training that differ for a baseline
  # expanded_sizes: [2, 8] # widths of expanded SAEs, in members; default: all members
  keep_residuals: last # residuals whose bytes stay on disk: last, all, none; missing ones are computed when needed
  automation: off # on: missing and stale artefacts are made automatically while `saeens ui` runs
  schedule: 0 3 * * 0 # cron, in UTC, of the retraining schedule, which has to be switched on in the UI
  # freshness: {{fail_days: 14, warn_days: 8}} # age at which tables are shown as overdue
  evaluations: [reconstruction, members, coactivation, stability, marginal_gain, cost, training_curves] # tables to fill
  #   also features, contexts, autointerp, concept_detection, spurious_correlation
  # autointerp: {{model: gpt-4o-mini, features: 200}} # explains features by SAEENS_LLM_BASE_URL, see docs/how_to/autointerp.md
  # ce_loss_tokens: 4096 # test tokens for the language model's loss; 0: it is not measured
  # concept_detection: {{datasets: [fancyzhx/ag_news]}} # texts of that table; default: texts that are part of saeens
  # spurious_correlation: {{datasets: [LabHC/bias_in_bios]}} # texts of that table; default as above
  checks: {{max_dead_features: 0.2}} # thresholds of warnings; also min_explained_variance, target_l0, l0_tolerance
  evaluation_memory_gb: 8 # memory limit of evaluation; does not change results
"""


class NewExperiment(NamedTuple):
    """The path of a new experiment file. `is_read`: it is in a folder of experiment files."""

    path: Path
    is_read: bool


def new_experiment(name: str, model: str, layers: Sequence[int], output: Path | None = None) -> NewExperiment:
    """Write an experiment file for `model`, a value of `language_model`. Of a model on the hub only the configuration is downloaded.

    The file is `output`, or NAME.yaml in the first folder of SAEENS_EXPERIMENTS, or a file in the checkout. Nothing is overwritten.
    Raises ConfigurationError for a name in use or not allowed, an unknown model, and layers that the model does not have.
    """
    _require_free(name)
    path = (output or _default_path(name)).expanduser().absolute()
    if path.exists():
        raise ConfigurationError(f"{path} exists and is not overwritten: choose another name or --output")
    description = describe_language_model(str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model)
    validate_hook(description, HOOK, layers)
    text = render(name, description, layers)
    _validate(text, description)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SaeensError(f"{path} cannot be written ({error.strerror}): choose another file with --output") from error
    return NewExperiment(path, path.resolve() in [each.resolve() for each in find_files()])


def parse_layers(given: Sequence[str]) -> list[int]:
    """Return layers from comma-separated numbers. Raises ConfigurationError for anything else."""
    parts = [part.strip() for each in given for part in each.split(",")]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise ConfigurationError(f"--layers: {wrong[0]!r} is not a layer; give whole numbers from 0, such as 2,4,6")
    return [int(part) for part in parts]


def render(name: str, description: LanguageModelDescription, layers: Sequence[int]) -> str:
    """Return the text of the file, with the model's sizes and sensible defaults."""
    facts = (
        f"{description.model_type}, {description.n_layers} layers, d_in {description.d_model:_}, "
        f"context {description.context_length:_}, vocabulary {description.vocab_size:_}"
    )
    return _TEMPLATE.format(
        name=name,
        model=" ".join(description.name.split()),
        facts=facts,
        language_model=_scalar(description.name),
        hook=HOOK,
        layers=", ".join(map(str, sorted(layers))),
        last_layer=description.n_layers - 1,
        context_length=min(description.context_length, MAX_CONTEXT_LENGTH),
        max_context_length=description.context_length,
        packing="document" if description.end_of_text is None else "concatenate",  # windows across documents need a separator
        train_tokens=TRAIN_TOKENS,
        test_tokens=TEST_TOKENS,
        gigabytes=(TRAIN_TOKENS + TEST_TOKENS) * description.d_model * 2 / 1e9,
        expansion=EXPANSION,
        d_model=description.d_model,
        d_sae=EXPANSION * description.d_model,
        k=max(1, 2 ** round(math.log2(max(1.0, description.d_model / DIMENSIONS_PER_FEATURE)))),
        dead_after_tokens=TRAIN_TOKENS // 10,
    )


def _require_free(name: str) -> None:
    try:
        validate_name(name)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    catalogue = load_catalogue()
    for kind, taken in (("an experiment", catalogue.experiments), ("a source", catalogue.sources)):
        if name in taken:
            raise ConfigurationError(f"there already is {kind} called {name!r}: choose another name, or edit its file")


def _validate(text: str, description: LanguageModelDescription) -> None:
    """Raise ConfigurationError unless the file can be read and run as it is."""
    source, experiment = (document["attributes"] for document in yaml.safe_load_all(text))
    try:
        settings = SourceSettings.model_validate(source)
        validate_targets(ExperimentSettings.model_validate(experiment), description.d_model)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}" for each in error.errors())
        raise ConfigurationError(reasons) from None
    validate_source(settings, settings.layers)


def _default_path(name: str) -> Path:
    for folder in own_folders():
        return folder / f"{name}.yaml"
    checkout = Path(next(iter(defs.__path__)))
    if not (checkout.parents[1] / "pyproject.toml").exists():
        raise ConfigurationError(f"this is not a checkout: give --output, or set {FOLDERS_VARIABLE} to a folder for experiment files")
    return checkout / name / "defs.yaml"


def _scalar(text: str) -> str:
    """Return a string as YAML, quoted if it would mean something else without quotes."""
    plain = re.fullmatch(r"[\w./~-]+", text) and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)
