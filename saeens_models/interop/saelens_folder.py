"""Folders of SAELens, also with an ensemble: SAELens loads it after ``import saeens_models.interop.sae_lens``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from saeens_models.architectures import SAE, SAEConfig, load_sae, sae_class, save_sae
from saeens_models.architectures.saelens_format import CONFIG_FILE, WEIGHTS_FILE, write_saelens_folder
from saeens_models.architectures.weight_files import check_finite, check_shapes, check_width, in_words, read_json, read_safetensors
from saeens_models.ensembles import Bagging, Boosting, Ensemble
from saeens_models.interop.foreign import Format, refuse_input_scale

ENSEMBLE_ARCHITECTURE = "saeens_ensemble"
"""Name under which ``saeens_models.interop.sae_lens`` registers ensembles with SAELens."""
_MEMBER = "ensemble.members.{}."
"""Prefix of the names of a member's weights."""


class _EnsembleFields(BaseModel):
    """Fields of ``cfg.json`` of an ensemble."""

    kind: Literal["bagging", "boosting"]
    members: Annotated[list[SAEConfig], Field(min_length=1)]
    metadata: dict[str, Any] = {}


def read(file: Path, input_scale: float | None) -> SAE | Bagging | Boosting:
    """Read the SAE of a folder, see :func:`saeens_models.load_sae`, or the ensemble that :func:`write_ensemble` wrote."""
    config_file = file.parent / CONFIG_FILE
    if config_file.is_file() and read_json(config_file).get("architecture") == ENSEMBLE_ARCHITECTURE:
        refuse_input_scale(input_scale, file)
        return _read_ensemble(file, config_file)
    return load_sae(file.parent, input_scale)


def _read_ensemble(file: Path, config_file: Path) -> Bagging | Boosting:
    try:
        fields = _EnsembleFields.model_validate_json(config_file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{config_file}: {in_words(error)}") from error
    for j, config in enumerate(fields.members):
        for name in ("d_in", "d_sae"):
            check_width(config_file, f"members.{j}.{name}", getattr(config, name))
    stated, widths = read_json(config_file), {"d_in": fields.members[0].d_in, "d_sae": sum(config.d_sae for config in fields.members)}
    for name, width in widths.items():
        if stated.get(name, width) != width:
            raise ValueError(f"{config_file}: {name} is {stated[name]!r}, and that of the members is {width}")
    weights = read_safetensors(file)
    metadata = {name: value for name, value in fields.metadata.items() if name != "sae_lens_version"}
    saes: list[SAE] = []
    for j, config in enumerate(fields.members):
        prefix = _MEMBER.format(j)
        of_member = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        cls = sae_class(config.architecture)
        check_shapes(of_member, cls, config.d_in, config.d_sae, f"member {j + 1} of {config_file}")
        check_finite(of_member, str(file))
        sae = cls(config)
        sae.load_state_dict(of_member)
        sae.metadata = dict(metadata)
        saes.append(sae)
    if weights:
        raise ValueError(f"{file}: unknown tensors {', '.join(sorted(weights)[:5])}")
    return Boosting(saes) if fields.kind == "boosting" else Bagging(saes)


def write_ensemble(ensemble: Ensemble, folder: Path) -> None:
    """Write an ensemble as one SAE of SAELens, with the weights of every member."""
    members = [sae.inference_form() for sae in ensemble]
    weights = {
        f"{_MEMBER.format(j)}{name}": weight.detach().cpu().contiguous()
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
