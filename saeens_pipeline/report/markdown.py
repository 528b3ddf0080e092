"""The results of an experiment as a page of Markdown with figures beside it; all numbers come from the tables and records on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from saeens_pipeline.assets.over_seeds import Spread, written
from saeens_pipeline.assets.registry import TABLES, evaluations_of, fills
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.report.charts import Chart
from saeens_pipeline.report.claims import MORE_FEATURES, Claim, Effect, Interval, Verdict, differences, verdicts
from saeens_pipeline.report.figures import all_charts, by_count
from saeens_pipeline.report.methods import in_order, listed, method
from saeens_pipeline.report.metrics import (
    CE,
    CONNECTIVITY,
    DIVERSITY,
    EQUAL_STABILITY,
    EV,
    FEATURES,
    FLOPS,
    L0,
    STABILITY,
)
from saeens_pipeline.report.pictures import COLUMN, PAGE, printed
from saeens_pipeline.report.record import Found, Record
from saeens_pipeline.report.results import Results
from saeens_pipeline.storage.recipes import Store

if TYPE_CHECKING:
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.settings import ExperimentSettings

USED = ("reconstruction", "differences", "cost", "members", "stability", "coactivation", "concept_detection", "spurious_correlation")
"""The tables that the page reads."""
PROBED = 6  # numbers of features of a probe's table, at most
_CHANCE = {"concept_detection": "0.5: half of the test texts have the label", "spurious_correlation": "0: nothing is regained"}
_NONE = "-"


@dataclass(frozen=True)
class Subject:
    """One layer of an experiment: its tables and records, and the tables of its control, if there is one."""

    experiment: ExperimentSettings
    layer: int
    results: Results
    record: Record
    control: str
    untrained: Results | None

    @classmethod
    def read(cls, store: Store, catalogue: Experiments, experiment: ExperimentSettings, layer: int) -> Subject:
        """Read one layer. Raises SaeensError, with the command that computes them, for tables of the page that are not on disk."""
        results = Results.read(store.root, experiment.name, layer, experiment.ensemble.seeds)
        if "reconstruction" not in {table.name for table in evaluations_of(experiment)}:
            raise ConfigurationError(f"{experiment.name} has no table reconstruction: add it to `evaluations` in the experiment file")
        wanted = [table.name for table in evaluations_of(experiment) if table.name in USED]
        seeds = set(experiment.ensemble.seeds)
        missing = [name for name in wanted if name not in results.tables or seeds - set(results.tables[name]["seed"])]
        if missing:
            raise SaeensError(
                f"{experiment.name} has no table {listed(missing)} of layer {layer}, for every seed, below {store.root} yet: "
                f"`saeens run {experiment.name}` computes {'it' if len(missing) == 1 else 'them'}"
            )
        control = catalogue.experiments.get(catalogue.controls.get(experiment.name, ""))
        untrained = Results.read(store.root, control.name, layer, control.ensemble.seeds) if control else None
        record = Record.read(store, experiment.name, experiment.source, layer)
        return cls(
            experiment, layer, results, record, control.name if control else "", untrained if untrained and untrained.tables else None
        )


def write_page(file: Path, subjects: Sequence[Subject]) -> list[Path]:
    """Write the page and, in a folder of the page's name beside it, its figures; return the paths, the page first.

    Raises ConfigurationError for a file that is not `.md`, or whose folder does not exist, before anything is written.
    """
    if file.suffix != ".md" or file.is_dir():
        raise ConfigurationError(f"--markdown {file}: give a file whose name ends with .md")
    if not file.parent.is_dir():
        raise ConfigurationError(f"--markdown {file}: there is no folder {file.parent}")
    drawn: dict[str, bytes] = {}
    text = _page(subjects, PurePosixPath(file.stem), drawn)
    folder = file.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, svg in drawn.items():
        _replace(folder / name, svg)
    _replace(file, text.encode())  # last: the page never names a figure that is not there
    return [file, *(folder / name for name in drawn)]


def write_figures(folder: Path, subjects: Sequence[Subject]) -> list[Path]:
    """Write every chart of the report as SVG and PDF, as wide as a column and as a page of a paper; return their paths."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--figures {folder}: there is a file of that name")
    drawn = {
        f"{_prefix(subject, subjects)}{chart.name}_{name}.{form}": printed(chart, inches, form)
        for subject in subjects
        for charts in all_charts(subject.results).values()
        for chart in charts
        for name, inches in (("column", COLUMN), ("page", PAGE))
        for form in ("svg", "pdf")
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in drawn.items():
        _replace(folder / name, content)
    return [folder / name for name in drawn]


def _replace(file: Path, content: bytes) -> None:
    aside = file.with_name(f".{file.name}.part")
    aside.write_bytes(content)
    aside.replace(file)


def _prefix(subject: Subject, subjects: Sequence[Subject]) -> str:
    return f"layer_{subject.layer}_" if len(subjects) > 1 else ""


def _page(subjects: Sequence[Subject], folder: PurePosixPath, drawn: dict[str, bytes]) -> str:
    name = subjects[0].experiment.name
    head = [
        f"# {name}: results",
        f"Written by `saeens report {name} --markdown`. All numbers are computed from the tables of `{name}`"
        f"{f' and of its control `{subjects[0].control}`' if subjects[0].untrained else ''}.",
    ]
    parts = [part for subject in subjects for part in _layer(subject, _prefix(subject, subjects), folder, drawn, several=len(subjects) > 1)]
    return "\n\n".join([*head, *parts]) + "\n"


def _layer(subject: Subject, prefix: str, folder: PurePosixPath, drawn: dict[str, bytes], *, several: bool) -> Iterator[str]:
    charts = {chart.name: chart for section in all_charts(subject.results).values() for chart in section}
    level = "###" if several else "##"

    def figure(name: str) -> Iterator[str]:
        chart = charts.get(name)
        if chart is not None:
            drawn[f"{prefix}{name}.svg"] = printed(chart, PAGE, "svg")
            yield f"![{_alt(chart)}]({folder / f'{prefix}{name}.svg'})"
            yield f"*{_escaped(chart.caption)}*"

    if several:
        yield f"## Layer {subject.layer}"
    sections: Sequence[tuple[str, Callable[[Subject], Iterator[str]], Sequence[str]]] = (
        ("What was run", _run, ()),
        ("Methods", _methods, ("explained_variance_by_members", "explained_variance_for_l0", "ce_loss_recovered_by_members")),
        ("At equal compute", _equal_compute, ("explained_variance_for_total_flops",)),
        ("Stability", _stability, ("stability_by_members",)),
        ("Diversity and coactivation", _diversity, ("diversity_by_members", "connectivity_by_members")),
        ("Concept detection", lambda subject: _probes(subject, "concept_detection"), ("concept_detection",)),
        ("Spurious correlations", lambda subject: _probes(subject, "spurious_correlation"), ("spurious_correlation",)),
        ("What holds and what does not of the paper's claims", _claims, ()),
    )
    for title, write, figures in sections:
        yield f"{level} {title}"
        yield from write(subject)
        for name in figures:
            yield from figure(name)


def _run(subject: Subject) -> Iterator[str]:
    rows = [(heading, fact.name, fact.value) for heading, facts in subject.record.facts() for fact in facts]
    rows += [("Text", name, value) for name, value in _composition(subject.record)]
    rows += [("Computation", name, value) for name, value in (*_hours(subject.record), *_disk(subject.record))]
    order = list(dict.fromkeys(heading for heading, _, _ in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    shown = [("" if i and rows[i - 1][0] == heading else heading, name, value) for i, (heading, name, value) in enumerate(rows)]
    yield _table(("", "", ""), [tuple(map(_escaped, row)) for row in shown])


def _composition(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the parts of a corpus that its identity names."""
    identity = record.tokens.settings["corpus"] if record.tokens else None
    for name, value in identity.items() if isinstance(identity, Mapping) else ():
        if name == "parts":  # of a mixed corpus
            yield "corpus: shares", "; ".join(f"{each['share']:.3g} {each['name']}" for each in value)
        elif isinstance(value, Mapping):
            yield f"corpus: {name.replace('_', ' ')}", f"{len(value)}: {'; '.join(f'{key} {each}' for key, each in value.items())}"
        elif name not in ("corpus", "name", "mixing"):
            yield (
                f"corpus: {name.replace('_', ' ')}",
                f"{len(value)}: {'; '.join(map(str, value))}" if isinstance(value, list) else str(value),
            )


def _hours(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the hours of all steps whose time is recorded. A link has the time of its original; a shared pass counts once."""
    spent: dict[str, dict[Any, float]] = {"activations": {}, "training": {}, "tables": {}}
    for each in record.found:
        made, builder = each.artefact.provenance, each.artefact.recipe["builder"]
        if builder == "sae":
            spent["training"][each.version] = made.get("train_seconds") or 0
        elif builder == "residual":
            spent["training"][each.version] = made.get("seconds") or 0
        elif each.address.kind == "source":
            spent["activations"][each.version] = made.get("seconds") or 0
        elif each.address.kind == "eval":
            spent["tables"][made.get("run_id"), made.get("seconds")] = made.get("seconds") or 0
    totals = {name: sum(each.values()) / 3600 for name, each in spent.items()}
    yield "hours", f"{sum(totals.values()):.3g} ({', '.join(f'{name} {hours:.3g}' for name, hours in totals.items())})"


def _disk(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the size of all artefacts on disk; files that are linked count once."""
    sizes: dict[tuple[int, int], int] = {}
    for each in record.found:
        for file in _files(each):
            stat = file.stat()
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    yield "disk", f"{sum(sizes.values()) / 1e9:.3g} GB"


def _files(found: Found) -> Iterator[Path]:
    path = found.artefact.path
    yield from (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _methods(subject: Subject) -> Iterator[str]:
    results = subject.results
    if results.caution:
        yield f"**Caution.** {results.caution}."
    untrained = subject.untrained.full(EV) if subject.untrained else {}
    tokens = {size.method: spread for size, spread in results.spreads("cost", "train_tokens").items() if size in results.full_sizes}
    heads = ["method", "n", "L0", "features", "training tokens", "training FLOPs", "EV", *_over(results), "CE recovered"]
    rows = []
    for size in results.full_sizes:
        ev = results.full(EV).get(size.method)
        cells = [
            method(size.method).label,
            str(size.n_members),
            *(_number(results.full(each).get(size.method), each.form) for each in (L0, FEATURES)),
        ]
        cells += [_number(tokens.get(size.method), ",.0f"), _number(results.full(FLOPS).get(size.method), FLOPS.form)]
        cells += [
            _number(ev, EV.form),
            *([_around(ev, EV.form)] if _over(results) else []),
            _number(results.full(CE).get(size.method), CE.form),
        ]
        rows.append([*cells, *([_number(untrained.get(size.method), EV.form)] if subject.untrained else [])])
    yield _table([*heads, *(["EV untrained"] if subject.untrained else [])], rows)
    yield (
        "EV: share of the held-out activations' variance that is explained. L0: features that fire per token. "
        "CE recovered: share of the next-token loss that zeros in place of the activations add and the reconstruction takes away. "
        f"{_control_sentence(subject)}"
    )


def _over(results: Results) -> list[str]:
    """Return the heading of the column of intervals: none for one seed."""
    return [] if len(results.seeds) < 2 else ["EV by seed" if len(results.seeds) == 2 else "95 %"]


def _control_sentence(subject: Subject) -> str:
    if subject.untrained:
        return f"Untrained: the control `{subject.control}`, the same experiment on a language model with random weights."
    if subject.control:
        return f"The control has no tables: `saeens run {subject.control}` computes them."
    return "There is no control on an untrained language model."


def _equal_compute(subject: Subject) -> Iterator[str]:
    results, base = subject.results, "compute_matched"
    if base not in results.full(EV):
        yield f"Not measured: `{base}` is not among the `baselines`."
        return
    flops, l0, ev = results.full(FLOPS), results.full(L0), results.full(EV)
    rows = []
    for name in in_order(ev):
        found = differences(results, EV.column, name, base)
        if name in (base, "single") or not found:
            continue
        cost = _number(Spread.of([flops[name].mean / flops[base].mean]), ".2f") if {name, base} <= flops.keys() else _NONE
        row = [method(name).label, cost, _number(l0.get(name), L0.form), _number(ev[name], EV.form), _intervals(found, ".4f")]
        theirs = differences(subject.untrained, EV.column, name, base) if subject.untrained else []
        rows.append([*row, *([_intervals(theirs, ".4f")] if subject.untrained else [])])
    heads = ["method", "FLOPs, relative", "L0", "EV", "EV difference"]
    yield f"Against one SAE trained with the computation of bagging (EV {_number(ev[base], EV.form)}, L0 {_number(l0.get(base), L0.form)}):"
    yield _table([*heads, *(["untrained"] if subject.untrained else [])], rows)
    yield (
        "EV difference: by seed, with the 95% interval of a paired bootstrap over held-out documents. "
        "More features per token explain more: see L0."
    )


def _stability(subject: Subject) -> Iterator[str]:
    columns = (
        ("stability", STABILITY.column), ("at equal candidates", EQUAL_STABILITY.column),
        ("one SAE, as many features", "stability_reference"), ("chance: random", "stability_chance_isotropic"),
        ("chance: same covariance", "stability_chance_covariance"), ("chance: picked activations", "stability_chance_data"),
        ("one-to-one (pw_mcc)", "pw_mcc"), ("its chance: random", "pw_mcc_chance_isotropic"),
    )  # fmt: skip
    yield from _by_method(
        subject,
        "stability",
        columns,
        "Stability: mean over features of the largest cosine to a feature of any other seed. It grows with the number of features: compare "
        f"it with the columns beside it, or at equal candidates. {len(subject.results.seeds)} seeds.",
        control=(STABILITY.column, EQUAL_STABILITY.column),
    )


def _diversity(subject: Subject) -> Iterator[str]:
    columns = ((FEATURES.title, FEATURES.column), ("distinct features", DIVERSITY.column), ("connectivity", CONNECTIVITY.column))
    yield from _by_method(
        subject,
        "coactivation",
        columns,
        "Distinct features: those whose largest cosine to any other feature of the dictionary is below 0.7. Connectivity: share of feature "
        "pairs that never fire on the same token; it depends on the number of features and of test tokens.",
        control=(DIVERSITY.column, CONNECTIVITY.column),
    )


def _by_method(subject: Subject, table: str, columns: Sequence[tuple[str, str]], about: str, control: Sequence[str]) -> Iterator[str]:
    """Yield a table of columns by method at full size; those of `control` also of the untrained language model."""
    if table not in subject.results.tables:
        yield _not_measured(subject, table)
        return
    shown = [(title, _full(subject.results, _home(table, column), column), _form(column)) for title, column in columns]
    shown += [
        (f"{title}, untrained", _full(subject.untrained, _home(table, column), column), _form(column))
        for title, column in columns
        if subject.untrained and column in control
    ]
    shown = [each for each in shown if each[1]]
    names = in_order(name for title, values, _ in shown if title != FEATURES.title for name in values)
    if not names:
        one_seed = "there is one seed, and it compares seeds" if table == STABILITY.table and len(subject.results.seeds) == 1 else ""
        yield f"Not measured: {one_seed or f'the table `{table}` has no values'}."
        return
    yield _table(
        ["method", *(title for title, _, _ in shown)],
        [[method(name).label, *(_with_points(values.get(name), form) for _, values, form in shown)] for name in names],
    )
    yield about


def _home(table: str, column: str) -> str:
    return FEATURES.table if column == FEATURES.column else table


def _form(column: str) -> str:
    return ",.0f" if column in (FEATURES.column, DIVERSITY.column) else ".4f"


def _full(results: Results | None, table: str, column: str) -> dict[str, Spread]:
    if results is None:
        return {}
    return {size.method: spread for size, spread in results.spreads(table, column).items() if size in results.full_sizes}


def _probes(subject: Subject, table: str) -> Iterator[str]:
    curve, rows = TABLES[table].curve, subject.results.tables.get(table)
    if rows is None or curve is None:
        yield _not_measured(subject, table)
        return
    names = (curve.x, curve.y, curve.group)
    values = by_count(rows, *names)
    theirs = subject.untrained.tables.get(table) if subject.untrained else None
    untrained = by_count(theirs, *names) if theirs is not None else {}
    counts = sorted({size.n_members for size in values if size.method == "single"})[:PROBED]
    found: list[list[str]] = []
    for name in in_order(size.method for size in values):
        of_method = {size.n_members: spread for size, spread in values.items() if size.method == name}
        of_control = {size.n_members: spread for size, spread in untrained.items() if size.method == name}
        cells = (_number(of_method.get(n), ".3f") + (f" ({_number(of_control.get(n), '.3f')})" if n in of_control else "") for n in counts)
        found.append([method(name).label, *cells])
    yield _table([f"{curve.y_title}, {curve.x_title}:", *map(str, counts)], found)
    groups = rows[curve.group].n_unique()
    what = f"{groups} {'data set' if curve.group == 'dataset' else curve.group}{'s' if groups > 1 else ''}"
    beside = "In brackets: the untrained language model. " if untrained else ""
    yield f"{curve.about} {beside}{what}. Chance: {_CHANCE[table]}. `activations`: the probe on raw activations."


def _not_measured(subject: Subject, table: str) -> str:
    assert not fills(subject.experiment, table), "Subject.read refuses missing tables"
    return f"Not measured: `{table}` is not among the `evaluations`."


def _claims(subject: Subject) -> Iterator[str]:
    found = list(verdicts(subject.results, subject.untrained))
    yield (
        "A claim **holds** if the interval of the difference is above 0, in every seed where each has one. It **does not hold** if the "
        f"interval is below 0. It **cannot be told** if the interval spans 0, if the better method has more than {MORE_FEATURES} times as "
        "many features per token (claims about explained variance), or if the control shows the same effect. "
        + (
            ""
            if subject.untrained
            else "There are no numbers of a control, which could turn a claim that holds into one that cannot be told."
        )
    )
    yield _table(
        ["claim", "verdict", "numbers", "difference, 95 % interval", *(["untrained"] if subject.untrained else [])],
        [_verdict_row(each, with_control=bool(subject.untrained)) for each in found],
    )
    kinds = dict.fromkeys(f"{each.claim.metric}: {each.claim.interval}" for each in found if each.effect)
    yield f"Intervals. {'; '.join(kinds)}." if kinds else ""


def _verdict_row(verdict: Verdict, *, with_control: bool) -> list[str]:
    claim, effect = verdict.claim, verdict.effect
    numbers = _NONE
    if effect:
        numbers = f"{claim.metric} {written(effect.ours, claim.form)} against {written(effect.theirs, claim.form)}"
        if claim.depends_on_l0 and verdict.l0:
            numbers += f"; L0 {' against '.join(written(each, L0.form) for each in verdict.l0)}"
    row = [claim.text, f"**{verdict.word}**: {'; '.join(verdict.why)}", numbers, _effect(effect, claim)]
    return [*row, *([_effect(verdict.of_control, claim)] if with_control else [])]


def _effect(effect: Effect | None, claim: Claim) -> str:
    if effect is None:
        return _NONE
    return (
        _intervals(effect.intervals, claim.form) if effect.intervals else f"{written(effect.ours - effect.theirs, claim.form)}, no interval"
    )


def _intervals(intervals: Iterable[Interval], form: str) -> str:
    shown = (f"{each.of}: {written(each.difference, form)} [{written(each.low, form)}, {written(each.high, form)}]" for each in intervals)
    return "; ".join(shown) or _NONE


def _number(spread: Spread | None, form: str) -> str:
    return _NONE if spread is None else written(spread.mean, form)


def _around(spread: Spread | None, form: str) -> str:
    return (spread.around(form) if spread else "") or _NONE


def _with_points(spread: Spread | None, form: str) -> str:
    if spread is None:
        return _NONE
    around = "" if len(set(spread.points)) == 1 else spread.around(form)
    return f"{written(spread.mean, form)} ({around})" if around and "," in around and form != ",.0f" else _number(spread, form)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Return text with the characters escaped that Markdown or HTML would read."""
    for character in "\\`*_<>[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def _alt(chart: Chart) -> str:
    return _escaped(f"{chart.title} ({chart.y.title} against {chart.x.title or 'the methods'})")
