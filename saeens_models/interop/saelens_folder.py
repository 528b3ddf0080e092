"""Folders of SAELens, also with an ensemble: SAELens loads it after ``import saeens_models.interop.sae_lens``."""

from pathlib import Path
from typing import Any

from saeens_models.architectures import SAE, load_sae, save_sae
from saeens_models.architectures.saelens_format import CONFIG_FILE, WEIGHTS_FILE, write_saelens_folder
from saeens_models.ensembles import Ensemble
from saeens_models.interop.foreign import Format

ENSEMBLE_ARCHITECTURE = "saeens_ensemble"
"""Name under which ``saeens_models.interop.sae_lens`` registers ensembles with SAELens."""


def read(file: Path, input_scale: float | None) -> SAE:
    """Read the SAE of a folder: see :func:`saeens_models.load_sae`."""
    return load_sae(file.parent, input_scale)


def write_ensemble(ensemble: Ensemble, folder: Path) -> None:
    """Write an ensemble as one SAE of SAELens, with the weights of every member."""
    members = [sae.inference_form() for sae in ensemble]
    weights = {
        f"ensemble.members.{j}.{name}": weight.detach().cpu().contiguous()
        for j, sae in enumerate(members)
        for name, weight in sae.state_dict().items()
    }
    cfg: dict[str, Any] = {
        "architecture": ENSEMBLE_ARCHITECTURE,
        "d_in": ensemble.d_in,
        "d_sae": ensemble.n_features,
        "apply_b_dec_to_input": False,
        "kind": ensemble.kind,
        "members": [sae.config.model_dump(mode="json") for sae in members],
        "metadata": dict(ensemble.metadata),
    }
    write_saelens_folder(folder, cfg, weights)


def write(sae: SAE, folder: Path) -> None:
    """Write one SAE: see :func:`saeens_models.save_sae`."""
    save_sae(sae, folder)


FORMAT = Format("sae_lens", f"{CONFIG_FILE} and {WEIGHTS_FILE}", (WEIGHTS_FILE,), read, write)
