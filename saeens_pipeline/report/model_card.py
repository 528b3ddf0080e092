"""The model card of a published SAE or ensemble: Markdown with metadata for the hub, from its recipes and tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import polars as pl
import yaml

from saeens_pipeline.assets.over_seeds import Spread, written
from saeens_pipeline.assets.publication import QUOTING, SAE_LENS_FOLDER, Publication, without_paths
from saeens_pipeline.assets.registry import Headline, listed
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.report.methods import Method, in_order, method

if TYPE_CHECKING:
    from saeens_models.interop.hub import Place

_TEMPLATES = Path(__file__).parent / "templates"
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
BIBTEX = """@inproceedings{gadgil2026ensembling,
  title = {Ensembling Sparse Autoencoders},
  author = {Gadgil, S. and Lin, C. and Lee, S.-I.},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2026},
  eprint = {2505.16077},
  archiveprefix = {arXiv},
  url = {https://arxiv.org/abs/2505.16077}
}"""
_MEMBER_COLUMNS = ("member", "explained_variance", "mse", "l0", "dead_features")


class Figure(NamedTuple):
    """A metric of the card, as text."""

    name: str
    value: str
    over_seeds: str
    meaning: str


def model_card(published: Publication, place: Place, license: str | None) -> str:
    """Return the text of the model card. `license`: an identifier of the hub, or None."""
    settings, tokens = published.settings_of("activations"), published.settings_of("tokens")
    configs = _configs(published)
    n_features, d_in = sum(each["d_sae"] for each in configs), configs[0]["d_in"]
    address, (layer, seed) = published.subject.address, published.subject.partition
    model = settings.get("language_model", {})
    rows = {name: frame for name, frame in published.tables.items() if name != "differences"}
    size = _size(published, rows)
    about = method(size[0] if address.kind == "baseline" else published.kind)
    is_later_round = address.kind == "boosting" and not published.is_ensemble and address.name != "round_1"
    page = {
        "front": yaml.safe_dump(_front(published, settings, tokens, configs, license), sort_keys=False, allow_unicode=True).strip(),
        "title": f"{_what(published, configs)}, {model.get('name', 'unknown')} layer {layer}",
        "about": _about(published, about),
        "facts": [
            ("language model", _cell(_identity(model, settings.get("weights")))),
            ("hook", _cell(configs[0]["metadata"].get("hook_name", settings.get("hook", "")))),
            ("layer", f"{layer}, counted from 0"),
            ("input size", f"{d_in}"),
            ("features", f"{n_features:,}{f', {len(configs)} SAEs' if published.is_ensemble else ''}"),
            ("seed of the ensemble" if address.kind != "baseline" else "seed", f"{seed}"),
            ("asset", f"`{address}`"),
            ("data version", f"`{published.subject.artefact.data_version}`"),
        ],
        "version": published.saes[-1].artefact.provenance.get("versions", {}).get("saeens", ""),
        "place": place,
        "given": "the residual that the rounds before it leave" if is_later_round else "activations at the hook as they are",
        "variable": "ensemble" if published.is_ensemble else "sae",
        "d_in": d_in,
        "n_features": n_features,
        **_saelens(published, place),
        "seed": seed,
        "seeds": list(published.of_seeds),
        "figures": list(_figures(published, rows, size)),
        "differences": list(_differences(published, size)),
        "documents": _documents(published),
        "members": _members(published),
        "members_title": "Each member or round, on its own input:" if published.is_ensemble else "As a member, on its own input:",
        "missing": list(_missing(published, settings)),
        "training": list(_training(published, tokens)),
        "licence": f"`{license}`, for the files of this folder." if license else "The publisher has stated no licence for these files.",
        "bibtex": BIBTEX,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # Markdown: _cell escapes
    return environment.get_template("model_card.md").render(page).rstrip() + "\n"


def _configs(published: Publication) -> list[dict[str, Any]]:
    """Return the configurations of the SAEs in their pushed form."""
    names = [f"{each.address.name}/cfg.json" if published.is_ensemble else "cfg.json" for each in published.saes]
    contents = (published.files[name].content for name in names)
    return [json.loads(content) for content in contents if isinstance(content, bytes)]


def _what(published: Publication, configs: Sequence[Mapping[str, Any]]) -> str:
    kinds = " and ".join(dict.fromkeys(_architecture(each) for each in configs))
    if published.is_ensemble:
        return f"{method(published.kind).label.capitalize()} of {len(configs)} {kinds} SAEs"
    return f"{kinds} SAE ({published.subject.address.name.replace('_', ' ')})"


def _architecture(config: Mapping[str, Any]) -> str:
    trained_as = config["metadata"].get("saeens_trained_as") or config
    return str(trained_as["architecture"])


def _about(published: Publication, about: Method) -> str:
    address = published.subject.address
    if published.is_ensemble or address.kind not in ("bagging", "boosting"):
        return about.description
    number, kind = address.name.rpartition("_")[2], address.kind
    return f"{'Round' if kind == 'boosting' else 'Member'} {number} of an ensemble, alone. {about.label.capitalize()}: {about.description}"


def _identity(model: Mapping[str, Any], weights: str | None) -> str:
    revision = f", revision `{model['revision']}`" if model.get("revision") else ""
    of_weights = {name: value for name, value in (model.get("sha256") or {}).items() if name.lower().endswith((".safetensors", ".gguf"))}
    hashes = "".join(f", {name} SHA-256 `{value[:16]}`" for name, value in of_weights.items())
    quantised = f", quantised ({model['quantised']})" if model.get("quantised") else ""
    return f"{model.get('name', 'unknown')}{revision}{hashes}{quantised}{'' if weights in (None, 'trained') else f', {weights} weights'}"


def _front(
    published: Publication,
    settings: Mapping[str, Any],
    tokens: Mapping[str, Any],
    configs: Sequence[Mapping[str, Any]],
    license: str | None,
) -> dict[str, Any]:
    """Return the metadata that the hub reads. A language model and a corpus are named if they are the hub's."""
    model, corpus = settings.get("language_model", {}), tokens.get("corpus", {})
    front: dict[str, Any] = {"license": license} if license else {}
    front["library_name"] = "saeens"
    kinds = dict.fromkeys(_architecture(each).replace("_", "-") for each in configs)
    front["tags"] = ["sparse-autoencoder", "interpretability", "saeens", "saelens", published.kind.replace("_", "-"), *kinds]
    if _is_on_hub(model.get("name"), model.get("revision")):
        front["base_model"] = model["name"]
    single = [part["identity"] for part in corpus.get("parts", [])] or [corpus]
    data_sets = [each["corpus"] for each in single if _is_on_hub(each.get("corpus"), each.get("revision"))]
    if data_sets:
        front["datasets"] = list(dict.fromkeys(data_sets))
    return front


def _is_on_hub(name: object, revision: object) -> bool:
    return bool(isinstance(name, str) and _ON_HUB.fullmatch(name) and isinstance(revision, str) and _COMMIT.fullmatch(revision))


def _saelens(published: Publication, place: Place) -> dict[str, str]:
    """Return the code that loads the files in SAELens, and a remark before it."""
    is_plain = f"{SAE_LENS_FOLDER}/cfg.json" in published.files
    first = published.saes[0].address.name
    inside = SAE_LENS_FOLDER if is_plain else first if published.is_ensemble else ""
    folder = "/".join(filter(None, (place.path, inside)))
    if place.revision or not folder:  # from_pretrained knows neither branches nor the root of a repository
        at = f", revision={place.revision!r}" if place.revision else ""
        local = f'snapshot_download("{place.repo}"{at})' + (f' + "/{folder}"' if folder else "")
        lines = ["from huggingface_hub import snapshot_download", "from sae_lens import SAE", "", f"sae = SAE.load_from_disk({local})"]
    else:
        lines = ["from sae_lens import SAE", "", f'sae = SAE.from_pretrained("{place.repo}", "{folder}")']
    if is_plain:
        return {"saelens": "\n".join(lines), "saelens_note": "the ensemble is one plain SAE"}
    if not published.is_ensemble:
        return {"saelens": "\n".join(lines), "saelens_note": ""}
    lines[-1] += f"  # {first} alone"
    lines += [
        "",
        "import saeens_models.interop.sae_lens  # registers the class of ensembles",
        "from saeens_models import interop",
        "",
        f'interop.export(interop.load("{place}"), "sae_lens", "ensemble_for_sae_lens")',
        'ensemble = SAE.load_from_disk("ensemble_for_sae_lens")',
    ]
    return {"saelens": "\n".join(lines), "saelens_note": "each SAE as it is, and the ensemble with a class of saeens"}


def _size(published: Publication, tables: Mapping[str, pl.DataFrame]) -> tuple[str, int]:
    """Return method and n_members under which the tables have the whole of what is pushed."""
    if published.is_ensemble:
        return published.kind, len(published.saes)
    whole = [frame.select("method", "n_members") for frame in tables.values() if "member" not in frame.columns]
    found = pl.concat(whole).unique() if whole else pl.DataFrame(schema={"method": pl.String, "n_members": pl.Int64})
    names = in_order(found["method"].to_list())
    return (names[0], found.filter(method=names[0])["n_members"].min()) if names else ("", 1)  # pyright: ignore[reportReturnType]


def _figures(published: Publication, tables: Mapping[str, pl.DataFrame], size: tuple[str, int]) -> Iterator[Figure]:
    """Yield the headline metrics of the tables on disk."""
    headlines: dict[tuple[str, str], Headline] = {}
    for table in listed(over_experiments=False):
        for each in table.headlines:
            known = headlines.get((each.table, each.column))
            headlines[each.table, each.column] = each if known is None or len(each.about) > len(known.about) else known
    for headline in headlines.values():
        value = _value(tables.get(headline.table), headline.column, size)
        if headline.table not in tables:
            continue
        of_seeds = [_value(of_seed.get(headline.table), headline.column, size, whole=True) for of_seed in published.of_seeds.values()]
        measured = [each for each in of_seeds if each is not None]
        spread = Spread.of_column(headline.column, pl.concat(measured, how="vertical_relaxed")) if measured else None
        yield Figure(
            _cell(headline.name or headline.title),
            "" if value is None else written(value[headline.column][0], headline.form),
            _over_seeds(spread, headline.form),
            _cell(headline.about),
        )


def _value(rows: pl.DataFrame | None, column: str, size: tuple[str, int], *, whole: bool = False) -> pl.DataFrame | None:
    """Return the row of a method and size, if it has a value of the column; with `whole`, with a value or not."""
    if rows is None:
        return None
    rows = with_totals(rows)
    if column not in rows.columns:
        return None
    found = rows.filter(method=size[0], n_members=size[1])
    if len(found) != 1 or (not whole and found[column].null_count()):
        return None
    return found


def _over_seeds(spread: Spread | None, form: str) -> str:
    if spread is None or len(spread.points) < 2:
        return ""
    around = spread.around(form)
    return f"{written(spread.mean, form)} {around}" if around.startswith("±") else around


def _differences(published: Publication, size: tuple[str, int]) -> Iterator[tuple[str, str, str, str]]:
    """Yield metric, other method, difference and interval, of what is pushed minus the other."""
    rows = published.tables.get("differences")
    if rows is None:
        return
    most = max(rows["n_members"].to_list() + rows["other_n_members"].to_list(), default=1)  # whole ensembles are among them
    for row in rows.iter_rows(named=True):
        one, other = (row["method"], row["n_members"]), (row["other_method"], row["other_n_members"])
        sign, against = (1, other) if one == size else (-1, one)
        if row["difference"] is None or size not in (one, other):
            continue
        ends = [] if row["low"] is None or row["high"] is None else sorted((sign * row["low"] + 0.0, sign * row["high"] + 0.0))
        interval = f"{ends[0]:+.4g} to {ends[1]:+.4g}" if ends else ""
        about = method(against[0])
        yield row["metric"], _cell(f"{about.label}, {about.at(against[1], most)}"), f"{sign * row['difference'] + 0.0:+.4g}", interval


def _documents(published: Publication) -> str:
    rows = published.tables.get("differences")
    numbers = [] if rows is None else sorted(rows["documents"].drop_nulls().unique())
    return " to ".join(f"{each:,}" for each in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else ""


def _members(published: Publication) -> list[Sequence[str]]:
    """Return heading and rows of the table of members; empty without it."""
    rows = published.tables.get("members")
    if rows is None:
        return []
    if not published.is_ensemble:
        rows = rows.head(1)
    shown = rows.select(_MEMBER_COLUMNS).sort("member")
    return [_MEMBER_COLUMNS, *([str(row[0]), *(f"{value:.4g}" for value in row[1:])] for row in shown.iter_rows())]


def _missing(published: Publication, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables without a row of what is pushed, and metrics that a table leaves out, with the reason."""
    kind = "synthetic" if "synthetic" in settings else "text"
    for table in listed(over_experiments=False):
        if table.of_sources not in ("all", kind):
            continue
        if table.name not in published.tables:
            yield f"`{table.name}`: {table.question}"
        elif table.name in QUOTING:
            yield f"`{table.name}` was measured and is not pushed: it quotes held-out texts"
    for name, reason in published.not_measured.items():
        yield f"{name}: {reason}"


def _training(published: Publication, tokens: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield names and values of data and settings; where SAEs differ, the values in member order."""
    corpus = tokens.get("corpus")
    if corpus:
        revision = f", revision `{corpus['revision']}`" if corpus.get("revision") else ""
        yield "corpus", _cell(f"{corpus.get('corpus') or corpus.get('name')}{revision}")
        for part in corpus.get("parts", []):
            at = part["identity"].get("revision")
            yield f"corpus, {part['share']:.3g}", _cell(f"{part['name']}{f', revision `{at}`' if at else ''}")
    names = ("context_length", "packing", "drop", "train_tokens", "test_tokens")
    yield from ((name, _cell(_shown(tokens[name], name))) for name in names if name in tokens)
    for each in published.saes:
        if place := each.artefact.provenance.get("published"):
            yield each.address.name.replace("_", " "), _cell(f"not trained here: {without_paths(place)}")
    flat = [_flat(without_paths(each.artefact.recipe["settings"])) for each in published.saes]
    for name in dict.fromkeys(name for each in flat for name in each):
        values = [_shown(each.get(name), name) for each in flat]
        yield f"`{name}`", _cell(values[0] if len(set(values)) == 1 else "; ".join(values))
    made = [each.artefact.provenance for each in published.saes]
    yield "device", _cell(", ".join(dict.fromkeys(str(each.get("device", "unknown")) for each in made)))
    versions = made[-1].get("versions", {})
    yield "versions", _cell(", ".join(f"{name} {version}" for name, version in versions.items() if name != "commit"))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def _shown(value: Any, name: str) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(each, name) for each in value) or "none"
    return "none" if value is None else f"{value:,}" if name.endswith("tokens") else str(value)


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
