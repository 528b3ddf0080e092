"""Settings of an EnsembleExperiment: SAEs, their ensembles, baselines and evaluation tables."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from croniter import CroniterError, croniter
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from saeens_pipeline.settings.autointerp import AutoInterpSettings
from saeens_pipeline.settings.from_file import CHANGES, FILE, Distinct, FromFile, Section, wrong_field
from saeens_pipeline.settings.labelled_data_sets import Labels
from saeens_pipeline.settings.messages import in_words, shown
from saeens_pipeline.settings.probing import ConceptDetectionSettings, SpuriousCorrelationSettings
from saeens_pipeline.settings.published import PublishedSAE
from saeens_pipeline.settings.sources import Name
from saeens_pipeline.settings.sweeps import name_of_value, swept, validate_sweep
from saeens_pipeline.storage.names import RESERVED_GROUPS

if TYPE_CHECKING:
    from saeens_models import SAESettings

MAX_MEMBERS = 999  # the initialisation seeds of two ensemble seeds are a thousand apart
MIN_FRESHNESS_DAYS = 1 / (24 * 60)  # the resolution of Dagster's freshness policies is a minute

_CRON_FIELDS, _CRON_CHARACTERS = 5, 200
_LATER = {"frozen": "none"}  # later fields with their defaults, which recipes of before lack
_FOLLOWS_FROM_ACTIVATIONS = ("total_tokens", "input_scale", "input_mean")


def _models():
    """Return saeens_models, which validates SAEs and training; it loads torch, which importing this module does not."""
    import saeens_models.architectures

    return saeens_models


def _outside_groups(name: str) -> str:
    if name in RESERVED_GROUPS or name.endswith("_saes"):
        raise ValueError(
            f"{name!r} would collide with a group of the asset graph: {', '.join(RESERVED_GROUPS)} and names that end in _saes are taken"
        )
    return name


def _read_saes(given: object) -> SAESettings | list[SAESettings]:
    """Return one configuration, or one per member; the errors of a list name the entry."""
    settings = _models().SAESettings
    if not isinstance(given, list):
        return settings.model_validate(given)
    saes: list[SAESettings] = TypeAdapter(list[settings]).validate_python(given)  # pyright: ignore[reportInvalidTypeForm]
    if len({sae.width_field for sae in saes}) > 1:
        raise ValueError("give expansion in every entry, or d_sae in every entry: widths of members are added up and compared")
    return saes


def _check_swept(sae: dict[str, Any], sweep: dict[str, list[Any]]) -> None:
    """Raise ValidationError for an unknown field of a sweep, and for a value that is invalid with the other settings of `sae`."""
    (field, values), allowed = swept(sweep), allowed_sae_keys(sae)
    if field not in allowed or field == "architecture":
        raise wrong_field(["sweep", field], f"unknown field of sae; one of: {', '.join(key for key in allowed if key != 'architecture')}")
    for i, value in enumerate(values):
        try:
            _read_saes(sae | {field: value})
        except ValidationError as error:
            for each in error.errors():
                if each["loc"][:1] == (field,) or (field in ("expansion", "d_sae") and not each["loc"]):
                    raise wrong_field(["sweep", field, i], f"{in_words(dict(each))} (found: {shown(value)})") from None


def allowed_sae_keys(sae: Mapping[str, Any]) -> list[str]:
    """Return the allowed keys of `sae`, which depend on its architecture; for an unknown one, the keys of all architectures."""
    known_classes = _models().architectures
    named = sae.get("architecture")
    known = [named] if named in known_classes.architectures() else known_classes.architectures()
    return list(dict.fromkeys(key for name in known for key in known_classes.settings_class(name).field_names()))


def allowed_training_keys() -> list[str]:
    """Return the allowed keys of `training`."""
    return [name for name in _models().TrainingConfig.model_fields if name not in _FOLLOWS_FROM_ACTIVATIONS]


def _validate_training(settings: dict[str, Any]) -> dict[str, Any]:
    for name in _FOLLOWS_FROM_ACTIVATIONS:
        if name in settings:
            raise ValueError(f"{name} follows from the activations and cannot be set")
    _models().TrainingConfig(**settings, total_tokens=1)
    return settings


_Training = Annotated[dict[str, Any], AfterValidator(_validate_training)]


_ON_OR_OFF = {"enum": ["on", "off", True, False]}  # `dg check yaml` reads YAML 1.1, too, and compares with the schema


def _on_or_off(value: object) -> object:
    return ("on" if value else "off") if isinstance(value, bool) else value  # YAML reads on as true


def _validate_cron(cron: str) -> str:
    try:
        valid = len(cron) <= _CRON_CHARACTERS and (len(cron.split()) == _CRON_FIELDS or cron.startswith("@")) and croniter.is_valid(cron)
        if valid:
            croniter(cron, datetime.now(UTC)).get_next()  # not for a date that does not exist, such as 30 February
    except (CroniterError, ValueError, KeyError, OverflowError):
        valid = False
    if not valid:
        raise ValueError("not a cron expression: give minute, hour, day of month, month and day of week, such as '0 3 * * 0'")
    return cron


class SpecialisedMember(Section):
    """An entry of `ensemble.specialised`: a bagging member with its own documents, or with the starting weights of another member."""

    member: PositiveInt = Field(description="number of the member, from 1")
    documents: dict[str, Annotated[Labels, Field(min_length=1), AfterValidator(sorted)]] = Field(
        {}, description="labels of the training documents, such as {language: [python, cython]}; default: all documents"
    )
    start_from: PositiveInt | None = Field(
        None, description="number of an earlier member whose trained weights are the initial weights; default: random weights"
    )

    @model_validator(mode="after")
    def _differs(self) -> SpecialisedMember:
        if not self.documents and self.start_from is None:
            raise ValueError("give documents, start_from, or both: without them the member is not specialised")
        if self.start_from is not None and self.start_from >= self.member:
            raise wrong_field(["start_from"], f"member {self.member} can start from a member before it, not from {self.start_from}")
        return self


class EnsembleSettings(Section):
    """`ensemble`: number of SAEs, seeds, and the order of training."""

    members: int = Field(ge=1, le=MAX_MEMBERS, description="number of SAEs per ensemble, J")
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Distinct] = Field(
        min_length=1, description="ensemble seeds, each for a repetition of all SAEs; stability compares them"
    )
    boosting: Literal["sequential", "concurrent"] = Field(
        "sequential", description="training of boosting rounds one after another, or all in one pass over the activations"
    )
    boosting_scale: Literal["shared", "per_round"] = Field(
        "shared",
        description="with normalize_activations, one scale for all boosting rounds, or for each the scale of its own input; with per_round "
        "an L1 or L0 coefficient means less in later rounds",
    )
    specialised: list[SpecialisedMember] = Field([], description="bagging members with their own documents or starting weights")
    published: list[PublishedSAE] = Field([], description="members that are loaded, not trained; member 1 is round 1 of boosting, too")

    @model_validator(mode="after")
    def _members_exist_once(self) -> EnsembleSettings:
        named: dict[int, str] = {}
        for field, entries in (("specialised", self.specialised), ("published", self.published)):
            for i, each in enumerate(entries):
                if each.member > self.members:
                    raise wrong_field([field, i, "member"], f"there is no member {each.member}: the ensemble has {self.members}")
                if each.member in named:
                    both = "twice" if named[each.member] == field else f"in {named[each.member]}, too: a published SAE is not trained"
                    raise wrong_field([field, i, "member"], f"member {each.member} is named {both}")
                named[each.member] = field
        for i, each in enumerate(self.published):
            if each.sae in [other.sae for other in self.published[:i]]:
                raise wrong_field(["published", i, "sae"], f"{each.sae} is a member already: two members would be the same SAE")
        return self

    def specialisation(self, member: int) -> SpecialisedMember | None:
        """Return the entry of a member, numbered from 1; None for members without one."""
        return next((each for each in self.specialised if each.member == member), None)

    def published_sae(self, member: int) -> PublishedSAE | None:
        """Return the entry of a published member, numbered from 1; None for one that is trained."""
        return next((each for each in self.published if each.member == member), None)


class FreshnessSettings(Section):
    """`freshness`: largest age of the tables, counted from the last run that computed or confirmed them."""

    fail_days: float = Field(ge=MIN_FRESHNESS_DAYS, description="age in days from which tables are overdue")
    warn_days: float | None = Field(None, ge=MIN_FRESHNESS_DAYS, description="age in days from which to warn; less than fail_days")

    @model_validator(mode="after")
    def _warned_before(self) -> FreshnessSettings:
        if self.warn_days is not None and self.warn_days >= self.fail_days:
            raise ValueError(f"warn_days: {self.warn_days:g} has to be less than fail_days: {self.fail_days:g}")
        return self


class CheckSettings(Section):
    """`checks`: thresholds for warnings. They do not change results and do not stop runs."""

    min_explained_variance: Annotated[float, Field(le=1)] | None = Field(
        default=None,
        description="least explained variance on test tokens, of SAEs before evaluation on their last training batch; default: no check",
    )
    max_dead_features: float = Field(default=0.2, ge=0, le=1, description="largest share of dead features of an SAE")
    target_l0: float | None = Field(
        default=None, gt=0, description="target L0 in features per token, for architectures without k; default: `sae.l0_target`"
    )
    l0_tolerance: float = Field(default=0.1, ge=0, description="largest relative distance from the target L0")


class ExperimentSettings(FromFile):
    """Fields of an EnsembleExperiment: ensembles of SAEs, baselines and evaluation tables."""

    name: Annotated[Name, AfterValidator(_outside_groups)] = Field(description="name of the experiment: lower-case letters, digits and _")
    source: Name = Field(description="name of an ActivationSource")
    sae: Annotated[Any, BeforeValidator(_read_saes, json_schema_input_type=dict[str, Any] | list[dict[str, Any]])] = Field(
        None,
        description="architecture, expansion or d_sae, and the fields of the architecture; or a list of such mappings, one per member. "
        "Left out where all members are published and nothing is trained",
    )
    sweep: Annotated[dict[str, list[int | float]], BeforeValidator(validate_sweep)] | None = Field(
        None, description="one field of sae with a list of values, each for an experiment of its own"
    )
    training: _Training = Field({}, description="fields of saeens_models.TrainingConfig")
    mixing: Literal["scattered", "contiguous"] = Field(
        "scattered",
        description="training rows that are shuffled together: of chunks from anywhere in the store, or of consecutive ones, which a "
        "source with keep_activations: test needs",
    )
    ensemble: EnsembleSettings = Field(description="number of SAEs, seeds, and the order of training")
    baselines: Annotated[list[Name] | None, Distinct] = Field(
        None,
        description="single SAEs for comparison; default: expanded, and expanded_l0_matched for SAEs with k or l0_target",
    )
    baseline_training: dict[Name, _Training] = Field({}, description="fields of training that differ for a baseline, by baseline")
    expanded_sizes: list[PositiveInt] | Literal["all"] | None = Field(
        None, description="widths of the expanded SAEs, in members: a list, or all sizes from 1; default: the width of all members"
    )
    keep_residuals: Literal["last", "all", "none"] = Field("last", description="residuals whose bytes stay on disk")
    automation: Annotated[Literal["on", "off"], BeforeValidator(_on_or_off), WithJsonSchema(_ON_OR_OFF)] = Field(
        "off", description="automatic runs for missing artefacts and for changed settings or inputs"
    )
    schedule: Annotated[str, AfterValidator(_validate_cron)] | None = Field(
        "0 3 * * 0", description="cron expression, in UTC, of the retraining schedule, switched on in the UI; null: no schedule"
    )
    freshness: FreshnessSettings | None = Field(None, description="largest age of tables, in days; default: no limit")
    evaluations: Annotated[list[Name] | None, Distinct] = Field(
        None, description="evaluation tables; default: those that `saeens tables` marks as default"
    )
    ce_loss_tokens: int = Field(4096, ge=0, description="number of test tokens for ce_loss_recovered, evenly spread; 0: not measured")
    concept_detection: ConceptDetectionSettings = Field(
        default=ConceptDetectionSettings(), description="texts for the table concept_detection, if evaluations includes it"
    )
    spurious_correlation: SpuriousCorrelationSettings = Field(
        default=SpuriousCorrelationSettings(), description="texts for the table spurious_correlation, if evaluations includes it"
    )
    autointerp: AutoInterpSettings | None = Field(
        None, description="language model and requests for the table autointerp, if evaluations includes it"
    )
    checks: CheckSettings = Field(CheckSettings(), description="thresholds for warnings: explained variance, dead features, L0")
    evaluation_memory_gb: float = Field(
        8.0, gt=0, description="memory limit for connectivity and pooled codes, in GB of 10^9 bytes; does not change results"
    )

    @model_validator(mode="before")
    @classmethod
    def _swept_field(cls, given: Any) -> Any:
        """Set the swept field of `sae` to the first value of the sweep: `sae` may leave it out."""
        match given:
            case {"sae": list(), "sweep": dict()}:
                raise wrong_field(
                    ["sweep"], "sae is a list, one per member, and a sweep varies one field of one sae: leave out sweep, or give one sae"
                )
            case {"sae": dict(sae), "sweep": dict(sweep)}:
                try:
                    validate_sweep(sweep)
                except ValueError:  # the validator of `sweep` reports this
                    return given
                _check_swept(sae, sweep)
                field, values = swept(sweep)
                return {**given, "sae": {**sae, field: values[0]}}
        return given

    @field_validator("expanded_sizes")
    @classmethod
    def _some_size(cls, sizes: list[int] | str | None) -> list[int] | str | None:
        if sizes == []:
            raise ValueError("expected a list of at least one size, or all")
        return sizes

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentSettings:
        if self.sae is None:
            self._check_untrained()
            return self
        if self.ensemble.boosting == "concurrent" and self.ensemble.published_sae(1):
            message = "concurrent trains all rounds in one pass, and round 1 is published: write sequential"
            raise wrong_field(["ensemble", "boosting"], message)
        if isinstance(self.expanded_sizes, list) and max(self.expanded_sizes) > self.ensemble.members:
            raise ValueError(f"expanded_sizes: {max(self.expanded_sizes)} is more than the ensemble's {self.ensemble.members} members")
        if self.keep_residuals == "all" and self.ensemble.boosting == "concurrent":
            raise ValueError("keep_residuals: all, but ensemble.boosting: concurrent has no residuals; write none, or leave it out")
        if isinstance(self.sae, list) and len(self.sae) != (members := self.ensemble.members):
            raise wrong_field(["sae"], f"a list has one entry per member: {len(self.sae)} given, and ensemble.members is {members}")
        self._check_baseline_training()
        self._check_specialised()
        self._check_sweep()
        return self

    def _check_untrained(self) -> None:
        """Raise ValidationError, without `sae`, for a member that is not published, and for settings of training."""
        if len(self.ensemble.published) < self.ensemble.members:
            raise ValidationError.from_exception_data(
                "ExperimentSettings", [InitErrorDetails(type="missing", loc=("sae",), input=self.model_dump(exclude_unset=True))]
            )
        for field in ("sweep", "training", "baselines", "baseline_training", "expanded_sizes", "keep_residuals"):
            if field in self.model_fields_set and getattr(self, field):
                message = "nothing is trained: all members are published, and sae is left out. Leave this out, or give sae"
                raise wrong_field([field], message)
        seeds = self.ensemble.seeds
        if len(seeds) > 1 and not any(each.depends_on("seed") for each in self.ensemble.published):
            raise wrong_field(["ensemble", "seeds"], f"{len(seeds)} seeds of the same SAEs: give one, or write {{seed}} in published")

    def _check_baseline_training(self) -> None:
        """Raise ValidationError for training of a baseline that does not fit the experiment's."""
        for baseline, own in self.baseline_training.items():
            try:
                _validate_training({**self.training, **own})
            except ValidationError as error:
                raise wrong_field(["baseline_training", baseline], f"together with training: {in_words(dict(error.errors()[0]))}") from None

    def _check_sweep(self) -> None:
        """Raise ValidationError for a value whose experiment has no valid name or settings."""
        for i, value in enumerate(swept(self.sweep)[1] if self.sweep else []):
            field = swept(self.sweep or {})[0]
            try:
                self._experiment_of(field, value)
            except ValidationError as error:
                raise wrong_field(["sweep", field, i], f"{in_words(dict(error.errors()[0]))} (found: {shown(value)})") from None

    def _check_specialised(self) -> None:
        """Raise ValidationError for a member whose starting weights do not fit its SAE."""
        for i, each in enumerate(self.ensemble.specialised):
            if each.start_from is not None and not self.ensemble.published_sae(each.start_from):  # its shape is in its files
                saes = self.saes[each.member - 1], self.saes[each.start_from - 1]
                own, start = (f"{sae.architecture}, {sae.width_field} {sae.width}" for sae in saes)
                if own != start:
                    message = f"member {each.member} ({own}) cannot start from member {each.start_from} ({start}): these have to be equal"
                    raise wrong_field(["ensemble", "specialised", i, "start_from"], message)

    @property
    def experiments(self) -> list[ExperimentSettings]:
        """The declared experiments: this one, or one for each value of its sweep."""
        if self.sweep is None:
            return [self]
        field, values = swept(self.sweep)
        return [self._experiment_of(field, value) for value in values]

    def _experiment_of(self, field: str, value: float) -> ExperimentSettings:
        given = self.model_dump(exclude_unset=True, exclude={"sweep"})
        own = {"name": name_of_value(self.name, field, value), "sae": {**given["sae"], field: value}}
        return ExperimentSettings.model_validate(given | own, context={FILE: self.file, CHANGES: self.changes})

    def on_source(self, source: str, suffix: str) -> ExperimentSettings:
        """Return this experiment, or sweep, on another source, as NAME__SUFFIX. Raises ValidationError for a name that is not possible."""
        own = {"name": f"{self.name}__{suffix}", "source": source}
        return ExperimentSettings.model_validate(
            self.model_dump(exclude_unset=True) | own, context={FILE: self.file, CHANGES: self.changes}
        )

    @property
    def saes(self) -> list[SAESettings]:
        """`sae` of each member, in order, those of published members too: rounds have them. Empty if nothing is trained."""
        if self.sae is None:
            return []
        return self.sae if isinstance(self.sae, list) else [self.sae] * self.ensemble.members

    def joined_sae(self, n: int, *, l0_matched: bool = False) -> SAESettings:
        """Return member 1's `sae` with the sum of the widths of the first n members and, with `l0_matched`, of their L0."""
        return self.saes[0].joined(self.saes[:n], add_l0=l0_matched)

    @property
    def complete_training(self) -> dict[str, Any]:
        """`training` with all defaults but those of `_LATER`, as recipes hold it."""
        complete = _models().TrainingConfig(**self.training).model_dump(mode="json", exclude=set(_FOLLOWS_FROM_ACTIVATIONS))
        return {name: value for name, value in complete.items() if name not in _LATER or value != _LATER[name]}

    @property
    def expanded_widths(self) -> list[int]:
        """The widths of the expanded SAEs, in members."""
        if self.expanded_sizes is None:
            return [self.ensemble.members]
        return list(range(1, self.ensemble.members + 1)) if self.expanded_sizes == "all" else sorted(set(self.expanded_sizes))
