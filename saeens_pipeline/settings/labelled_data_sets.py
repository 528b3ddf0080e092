"""Labels in experiment files, and known labelled data sets: embedded tasks, and those of sae-probes and of SAEBench on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator


def _as_text(value: Any) -> Any:
    """Return an integer as text, as columns of numbers are read. Raises ValueError for a boolean, whose spelling YAML does not keep."""
    if isinstance(value, bool):
        raise ValueError("YAML reads this label as true or false: put it in quotes, as the texts have it, such as 'True'")
    return str(value) if isinstance(value, int) else value


Label = Annotated[str, BeforeValidator(_as_text)]
Labels = Annotated[list[Label], BeforeValidator(lambda value: [value] if isinstance(value, str | int) else value)]
"""A list of labels; a single label may be given without a list."""


class TextCount(NamedTuple):
    """Numbers of train and test texts of a probe, half of them positive."""

    train: int
    test: int


LANGUAGE, CODE_OR_PROSE, DOCSTRING_OR_CODE = "builtin/language", "builtin/code_or_prose", "builtin/docstring_or_code"
EMBEDDED_CONCEPTS = (LANGUAGE, CODE_OR_PROSE, DOCSTRING_OR_CODE)
LANGUAGE_AND_DOCUMENTATION = "builtin/language_and_documentation"
EMBEDDED_CORRELATIONS = (LANGUAGE_AND_DOCUMENTATION,)

_BIOS, _AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
Values = Mapping[str, str]
"""Names of labels by their value in the column; other values stay as they are."""

_PROFESSIONS: Values = {
    "0": "accountant", "1": "architect", "2": "attorney", "6": "dentist", "9": "filmmaker", "11": "journalist", "13": "nurse",
    "14": "painter", "18": "photographer", "19": "physician", "20": "poet", "21": "professor", "22": "psychologist", "25": "surgeon",
    "26": "teacher",
}  # fmt: skip
_GENDERS: Values = {"0": "male", "1": "female"}
_CATEGORIES: Values = {
    "1": "Toys_and_Games", "2": "Cell_Phones_and_Accessories", "3": "Industrial_and_Scientific", "5": "Musical_Instruments",
    "6": "Electronics", "11": "Office_Products", "18": "Pet_Supplies", "24": "Books", "26": "CDs_and_Vinyl", "30": "Software",
}  # fmt: skip
_RATINGS: Values = {"1": "1.0", "5": "5.0"}
_NEWS: Values = {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}


@dataclass(frozen=True)
class HubSet:
    """One data set on the hub, or a part of it. Probes are for `labels`, balanced by the column `other` if it is given."""

    path: str
    text: str
    label: str
    names: Values
    labels: tuple[str, ...] = ()
    other: str | None = None
    other_names: Values = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of target labels for spurious correlation removal; `other` is the spurious attribute."""
    spurious: tuple[str, str] = ("", "")


def _bios(*labels: str) -> HubSet:
    pairs = (("professor", "nurse"), ("architect", "journalist"), ("surgeon", "psychologist"), ("attorney", "teacher"))
    return HubSet(_BIOS, "hard_text", "profession", _PROFESSIONS, labels, "gender", _GENDERS, pairs, ("male", "female"))


def _amazon(*labels: str) -> HubSet:
    pairs = (
        ("Books", "CDs_and_Vinyl"),
        ("Software", "Electronics"),
        ("Pet_Supplies", "Office_Products"),
        ("Industrial_and_Scientific", "Toys_and_Games"),
    )
    return HubSet(_AMAZON, "text", "category", _CATEGORIES, labels, "rating", _RATINGS, pairs, ("1.0", "5.0"))


GITHUB_CODE, EUROPARL = "codeparrot/github-code", "Helsinki-NLP/europarl"
STREAMED = {GITHUB_CODE: ("C", "Python", "HTML", "Java", "PHP"), EUROPARL: ("en", "fr", "de", "es", "nl")}
EUROPARL_PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
_WHOLE = {
    "LabHC/bias_in_bios_class_set1": _bios("accountant", "architect", "attorney", "dentist", "filmmaker"),
    "LabHC/bias_in_bios_class_set2": _bios("journalist", "nurse", "painter", "photographer", "physician"),
    "LabHC/bias_in_bios_class_set3": _bios("poet", "professor", "psychologist", "surgeon", "teacher"),
    _AMAZON: _amazon(*(_CATEGORIES[number] for number in "12356")),
    f"{_AMAZON}_sentiment": HubSet(_AMAZON, "text", "rating", _RATINGS, ("1.0", "5.0")),
    "fancyzhx/ag_news": HubSet("fancyzhx/ag_news", "text", "label", _NEWS, tuple(_NEWS.values())),
}
HUB_SETS = _WHOLE | {_BIOS: _bios()}

HUB_CONCEPTS = (*_WHOLE, *STREAMED)
HUB_CORRELATIONS = (_BIOS, _AMAZON)

SAE_PROBES = "sae_probes/"
"""Prefix of the data sets in the package sae-probes, by the names of their files."""


class PackagedCorrelation(NamedTuple):
    """Texts that two data sets of sae-probes have in common. Values at the same place correlate in the biased probe."""

    target: str
    spurious: str
    target_values: tuple[str, str]
    spurious_values: tuple[str, str]
    texts: TextCount
    """By default: as many as the smallest group allows."""


SAE_PROBES_CORRELATIONS = {
    f"{SAE_PROBES}politician_and_sex": PackagedCorrelation(
        "7_hist_fig_ispolitician", "5_hist_fig_ismale", ("1", "0"), ("1", "0"), TextCount(160, 80)
    ),
    f"{SAE_PROBES}alive_and_sex": PackagedCorrelation(
        "57_wikidatais_alive", "56_wikidatasex_or_gender", ("True", "False"), ("female", "male"), TextCount(200, 100)
    ),
}
