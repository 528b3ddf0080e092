"""One run of SAELens from tokens to trained SAEs and their evaluation, in a process of its own: ``python -m ... JOB.json``.

It writes the seconds since the epoch at which each part ended to the job's ``report``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPORT = "parts.json"


@dataclass(frozen=True)
class Job:
    """Arguments of a run. Paths are strings."""

    model: str
    """Folder in transformers' format."""
    hook: str
    """Path of the module whose output is read."""
    train: str
    test: str
    """Parquet files with the column tokens, a window per row."""
    output: str
    """Folder for SAEs and the report."""
    seeds: list[int]
    """Seeds of the SAEs. One: by LanguageModelSAETrainingRunner; several: by MultiSAETrainingRunner, in one pass."""
    d_in: int
    d_sae: int
    k: int
    context: int
    batch_tokens: int
    batch_windows: int
    training_tokens: int
    learning_rate: float
    warm_up_steps: int
    n_batches_in_buffer: int
    evaluated_batches: int
    """Batches of windows for explained variance; one is for the next-token loss. 0: no evaluation."""
    b_dec: list[float] | None = None
    """Initial b_dec; None: zeros."""
    sae: dict[str, Any] = field(default_factory=dict)
    """Fields of TopKTrainingSAEConfig."""
    runner: dict[str, Any] = field(default_factory=dict)
    """Fields of the runner's configuration."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def main(path: str) -> None:
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    warnings.filterwarnings("ignore")
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, float] = {}

    import torch
    from datasets import Dataset
    from sae_lens.load_model import load_model

    parts["imports"] = time.time()
    model_arguments = {"dtype": "float32"}  # by default it takes the files' dtype, which is slower on a CPU if it is float16
    model = load_model("AutoModelForCausalLM", job.model, "cpu", model_arguments, [job.hook])
    parts["model"] = time.time()

    torch.manual_seed(job.seeds[0])  # SAELens' own seed is not applied in training
    train = Dataset.from_parquet(job.train, cache_dir=str(output / "datasets"))
    common: dict[str, Any] = {
        "model_name": job.model,
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": model_arguments,
        "dataset_path": "given below",
        "streaming": False,
        "context_size": job.context,
        "prepend_bos": False,
        "seqpos_slice": (1, None),
        "training_tokens": job.training_tokens,
        "train_batch_size_tokens": job.batch_tokens,
        "store_batch_size_prompts": job.batch_windows,
        "n_batches_in_buffer": job.n_batches_in_buffer,
        "lr": job.learning_rate,
        "lr_warm_up_steps": job.warm_up_steps,
        "device": "cpu",
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "output_path": str(output),
        **job.runner,
    }
    saes = _train_one(job, model, train, common) if len(job.seeds) == 1 else _train_several(job, model, train, common)
    parts["training"] = time.time()

    metrics = {str(seed): _evaluate(job, sae, model) for seed, sae in saes.items()} if job.evaluated_batches else {}
    parts["evaluation"] = time.time()
    (output / REPORT).write_text(json.dumps({"parts": parts, "metrics": metrics}), encoding="utf-8")


def _new_sae(job: Job) -> Any:
    import torch
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=job.d_in, d_sae=job.d_sae, k=job.k, device="cpu", **job.sae))
    if job.b_dec is not None:
        with torch.no_grad():
            sae.b_dec.copy_(torch.tensor(job.b_dec))
    return sae


def _train_one(job: Job, model: Any, train: Any, common: dict[str, Any]) -> dict[int, Any]:
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig

    sae = _new_sae(job)
    config = LanguageModelSAERunnerConfig(
        sae=sae.cfg, hook_name=job.hook, verbose=False, logger=LoggingConfig(log_to_wandb=False), **common
    )
    runner = LanguageModelSAETrainingRunner(config, override_dataset=train, override_model=model, override_sae=sae)
    return {job.seeds[0]: runner.run()}


def _train_several(job: Job, model: Any, train: Any, common: dict[str, Any]) -> dict[int, Any]:
    from sae_lens.config import LoggingConfig
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

    saes = {str(seed): _new_sae(job) for seed in job.seeds}
    config = MultiSAETrainingRunnerConfig(
        saes={name: sae.cfg for name, sae in saes.items()},
        hook_names=job.hook,
        logger=LoggingConfig(log_to_wandb=False),
        **common,
    )
    runner = MultiSAETrainingRunner(config, override_dataset=train, override_model=model, override_saes=saes)
    return {int(seed): sae for seed, sae in runner.run().items()}


def _evaluate(job: Job, sae: Any, model: Any) -> dict[str, Any]:
    """Return SAELens' metrics of one SAE on held-out windows: next-token loss, norms, sparsity, variance."""
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    test = Dataset.from_parquet(job.test, cache_dir=str(Path(job.output) / "datasets"))
    store = ActivationsStore.from_sae(
        model, sae, test, context_size=job.context, streaming=False, store_batch_size_prompts=job.batch_windows, device="cpu"
    )
    store.autocast_lm = bool(job.runner.get("autocast_lm"))
    config = EvalConfig(
        batch_size_prompts=job.batch_windows,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=job.evaluated_batches,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    metrics, _ = run_evals(sae.eval(), store, model, ActivationScaler(), config, exclude_special_tokens=False)
    return metrics


if __name__ == "__main__":
    main(sys.argv[1])
