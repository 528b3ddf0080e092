"""`type: saeens_pipeline.components.EnsembleExperiment`: SAEs, their ensembles, baselines and evaluation tables."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import dagster as dg
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from saeens_pipeline.components.activation_source import Name
from saeens_pipeline.storage.names import RESERVED_GROUPS

MAX_MEMBERS = 999  # ensemble seeds are a thousand initialisation seeds apart

Baseline = Literal["expanded", "expanded_l0_matched"]
Evaluation = Literal["reconstruction", "members", "coactivation", "stability", "cost", "training_curves"]


def _outside_groups(name: str) -> str:
    if name in RESERVED_GROUPS or name.endswith("_saes"):
        raise ValueError(
            f"{name!r} would collide with a group of the asset graph: {', '.join(RESERVED_GROUPS)} and names that end in _saes are taken"
        )
    return name


def _validate_sae(settings: dict[str, Any]) -> dict[str, Any]:
    from saeens_models.architectures import validate_settings

    if ("expansion" in settings) == ("d_sae" in settings):
        raise ValueError("give either expansion (d_sae = expansion * d_in) or d_sae")
    width = settings.get("expansion", settings.get("d_sae"))
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"{'expansion' if 'expansion' in settings else 'd_sae'} is a positive whole number, not {width!r}")
    validate_settings({name: value for name, value in settings.items() if name not in ("expansion", "d_sae")})
    return settings


class EnsembleSettings(BaseModel):
    """`ensemble`: how many SAEs, and how often all is repeated with another seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: int = Field(ge=1, le=MAX_MEMBERS, description="SAEs per ensemble, J")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1, description="ensemble seeds; stability compares them")

    @field_validator("seeds")
    @classmethod
    def _no_repetition(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} names a seed twice")
        return seeds


class ExperimentSettings(BaseModel):
    """The fields of an EnsembleExperiment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[Name, AfterValidator(_outside_groups)] = Field(description="lower-case letters, digits and _")
    source: Name = Field(description="the name of an ActivationSource")
    sae: Annotated[dict[str, Any], AfterValidator(_validate_sae)] = Field(
        description="architecture, expansion or d_sae, and the architecture's own fields"
    )
    training: dict[str, Any] = Field({}, description="fields of saeens_models.TrainingConfig")
    ensemble: EnsembleSettings
    baselines: list[Baseline] = Field(["expanded", "expanded_l0_matched"], description="single SAEs to compare with")
    expanded_sizes: list[PositiveInt] | Literal["all"] | None = Field(
        None, description="expanded SAEs as wide as n members; by default as wide as all"
    )
    keep_residuals: Literal["last", "all", "none"] = Field("last", description="which residuals' bytes stay on disk")
    automation: Literal["off", False] = Field("off", description="off: materialised only when asked for")
    evaluations: list[Evaluation] = Field(
        ["reconstruction", "members", "coactivation", "stability", "cost", "training_curves"], description="tables to fill"
    )

    @field_validator("training")
    @classmethod
    def _training_is_valid(cls, settings: dict[str, Any]) -> dict[str, Any]:
        from saeens_models import TrainingConfig

        for decided_here in ("total_tokens", "input_scale", "input_mean"):
            if decided_here in settings:
                raise ValueError(f"{decided_here} follows from the activations and cannot be set")
        TrainingConfig(**settings, total_tokens=1)
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentSettings:
        if isinstance(self.expanded_sizes, list) and max(self.expanded_sizes) > self.ensemble.members:
            raise ValueError(f"expanded_sizes: {max(self.expanded_sizes)} is more than the ensemble's {self.ensemble.members} members")
        if "expanded_l0_matched" in self.baselines:
            from saeens_models import SAEConfig

            own = {name: value for name, value in self.sae.items() if name not in ("expansion", "d_sae")}
            SAEConfig(**own, d_in=1, d_sae=2**31).with_l0_multiplied(1)
        return self

    @property
    def expanded_widths(self) -> list[int]:
        """How many members' widths each expanded SAE has."""
        if self.expanded_sizes is None:
            return [self.ensemble.members]
        return list(range(1, self.ensemble.members + 1)) if self.expanded_sizes == "all" else sorted(set(self.expanded_sizes))


class EnsembleExperiment(dg.Component):
    """An experiment: members, boosting rounds, residuals, baselines, ensembles and tables, partitioned by layer and seed."""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return ExperimentSettings

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> EnsembleExperiment:
        assert isinstance(attributes, ExperimentSettings)
        return cls(attributes)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        from saeens_pipeline.assets.dagster_assets import build_assets
        from saeens_pipeline.assets.experiments import experiment_ops

        return dg.Definitions(assets=build_assets(experiment_ops(self.settings)))
