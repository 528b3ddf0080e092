"""The whole job, from texts and a language model to SAEs and their evaluation, against SAELens' runners. A run is a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

import saeens_models as sm
from benchmarks.child import ChildUse, folder_bytes, run_child
from benchmarks.end_to_end_inputs import (
    BATCH_TOKENS,
    BATCH_WINDOWS,
    CONTEXT,
    DATA,
    FULL,
    MAX_NORM,
    QUICK,
    SEED,
    WARM_UP,
    Inputs,
    Precision,
    Size,
    experiment_file,
    our_saes,
    prepare,
    require_same_windows,
    say,
)
from benchmarks.options import Options
from benchmarks.peers.saelens_run import REPORT, Job
from benchmarks.report import Section
from benchmarks.runner import Agreement, Row, Side

TITLE = "End to end"
TOLERANCE = 0.03
"""Largest difference of mean explained variances: random weights and the order of rows differ."""
_BUFFER_WINDOWS = 512  # of SAELens' mixing buffer: 64 steps; with few, its batches have rows of few documents, and EV is lower
_PEER_RUNS = 3  # of SAELens' runner of one SAE: several SAEs take the mean of these as often as there are SAEs
_BFLOAT16 = ("amx_bf16", "avx512_bf16")
_OURS = [sys.executable, "-m", "saeens_pipeline", "run"]
_THEIRS = [sys.executable, "-m", "benchmarks.peers.saelens_run"]
_LOAD = (
    "import sys; from saeens_pipeline.language_models.models import describe_language_model as describe; "
    "from saeens_pipeline.language_models.loading import load_language_model as load; load(describe(sys.argv[1]), dtype=sys.argv[2])"
)


class Setting(NamedTuple):
    """Settings of SAELens."""

    name: str
    text: str
    sae: dict[str, Any]
    runner: dict[str, Any]


class Ours(NamedTuple):
    """Our runs of one round."""

    one: Side
    several: Side
    evaluated: Side
    """Several, with their evaluation."""
    ev_of_one: float
    ev_of_several: float
    disturbed: bool


class Theirs(NamedTuple):
    """A run of SAELens, in seconds."""

    imports: float
    loading: float
    training: float
    evaluation: float
    peak_bytes: int
    disk_bytes: int
    evs: list[float]
    """Explained variance of each SAE on the held-out rows."""
    disturbed: bool

    @property
    def until_trained(self) -> float:
        return self.imports + self.loading + self.training


class TheirsOfSetting(NamedTuple):
    """The runs of SAELens with one setting."""

    setting: Setting
    each: list[Theirs]
    """LanguageModelSAETrainingRunner, once per SAE, for the first `_PEER_RUNS` SAEs."""
    together: Theirs
    """MultiSAETrainingRunner."""

    @property
    def evs(self) -> list[float]:
        return [ev for run in self.each for ev in run.evs]


def run(options: Options) -> Section:
    """Measure one SAE, several, and several with their evaluation."""
    size = (QUICK if options.quick else FULL).with_tokens(options.tokens)
    about = _about(size)
    if find_spec("sae_lens") is None:
        return Section(TITLE, about, [], ["SAELens, which is not installed"])
    inputs = prepare(size, options)
    folders = (options.scratch / f"run_{number}" for number in count())
    precision = _best_precision()
    if not options.quick:
        say("one run of ours that does not count: it compiles the kernels")
        _run_ours(inputs, next(folders), precision, only_one=True)
    ours = [_run_ours(inputs, next(folders), precision)]
    peers: list[TheirsOfSetting] = []
    for setting in _settings(precision):
        each = [_run_theirs(inputs, next(folders), setting, [seed]) for seed in _seeds(size)[:_PEER_RUNS]]
        peers.append(TheirsOfSetting(setting, each, _run_theirs(inputs, next(folders), setting, _seeds(size))))
    ours += [_run_ours(inputs, next(folders), precision) for _ in range(size.rounds - 1)]
    rows = [row for peer in peers for row in _rows(size, ours, peer)]
    return Section(TITLE, about, rows, notes=[*map(_parts, peers), *_notes(inputs, precision, ours, peers, next(folders))])


def _about(size: Size) -> str:
    return (
        f"From the same {size.train_tokens:,} training tokens (windows of {CONTEXT}, without the first position) and {size.model}, output "
        f"of block {size.layer}, to TopK SAEs with {size.expansion} features per dimension and k {size.k}, in "
        f"{size.train_tokens // BATCH_TOKENS} batches of {BATCH_TOKENS:,} "
        f"tokens at learning rate {size.learning_rate:g} after a warm-up of {WARM_UP:.0%}: one SAE, {size.saes}, and {size.saes} with "
        f"their evaluation (variance and sparsity on {size.test_tokens:,} held-out tokens, next-token loss on "
        f"{BATCH_WINDOWS * CONTEXT:,}). Ours is `saeens run` of an experiment file in an empty data root; SAELens' "
        f"LanguageModelSAETrainingRunner runs once per SAE: {min(_PEER_RUNS, size.saes)} such runs are measured, and {size.saes} count as "
        f"{size.saes} times their mean. Its MultiSAETrainingRunner runs once for all. Every run is a process of its own, and "
        "start and imports count. Memory is the largest sum over the processes of a run, disk what a run leaves. EV is the mean over the "
        "SAEs, on the same float32 activations of the held-out tokens; it has to agree within "
        f"{TOLERANCE}: a row that says **NO** is no comparison."
    )


def _seeds(size: Size) -> list[int]:
    return list(range(SEED, SEED + size.saes))


def _best_precision() -> Precision:
    found = torch.cpu.get_capabilities()
    return "bfloat16" if any(found.get(name) for name in _BFLOAT16) else "float32"


def _settings(precision: Precision) -> list[Setting]:
    """Return SAELens' defaults and its fastest documented options on this processor."""
    common = (
        f"AutoModelForCausalLM in float32, windows tokenised beforehand, store_batch_size_prompts={BATCH_WINDOWS}, seqpos_slice=(1, None), "
        f"n_batches_in_buffer={_BUFFER_WINDOWS}, b_dec from the mean row, as ours (override_sae; by default it starts at 0), decoder free, "
        "rows from norm 0.1"
    )
    defaults = Setting("defaults", f"{common}; rescale_acts_by_decoder_norm=True, dense, float32", {}, {})
    unscaled = {"rescale_acts_by_decoder_norm": False}
    if precision == "bfloat16":
        text = f"{common}; rescale_acts_by_decoder_norm=False, autocast=True, autocast_lm=True (bfloat16)"
        return [defaults, Setting("autocast", text, unscaled, {"autocast": True, "autocast_lm": True})]
    text = f"{common}; rescale_acts_by_decoder_norm=False, use_sparse_activations=True"
    return [defaults, Setting("sparse", text, {**unscaled, "use_sparse_activations": True}, {})]


def _run_ours(inputs: Inputs, folder: Path, precision: Precision, *, only_one: bool = False) -> Ours:
    """Run one SAE, several, and the evaluation of the several; the first two each in a data root of its own."""
    folder.mkdir()
    uses: list[ChildUse] = []

    def command(name: str, data: Path, *arguments: str) -> ChildUse:
        file = folder / "experiments" / "end_to_end.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(experiment_file(inputs, data, precision, evaluated=name == "evaluated"), encoding="utf-8")
        environment = {**inputs.environment, DATA: str(data), "SAEENS_EXPERIMENTS": str(file.parent)}
        uses.append(run_child([*_OURS, name, *arguments], environment, folder / f"{name}.log"))
        say(f"ours, {name}: {uses[-1].seconds:.1f} s")
        return uses[-1]

    data = folder / "one"
    use = command("one", data, "--select", "bagging/member_1")
    one = Side(use.seconds, use.peak_bytes, folder_bytes(data))
    ev_of_one = statistics.fmean(_evs(inputs, our_saes(data, inputs.size, "one")))
    if only_one:
        return Ours(one, one, one, ev_of_one, ev_of_one, use.disturbed)
    data = folder / "several"
    use = command("several", data, "--select", "bagging/bagging_ensemble")
    several = Side(use.seconds, use.peak_bytes, folder_bytes(data))
    after = command("evaluated", data)
    evaluated = Side(use.seconds + after.seconds, max(use.peak_bytes, after.peak_bytes), folder_bytes(data))
    require_same_windows(inputs, data)
    ev_of_several = statistics.fmean(_evs(inputs, our_saes(data, inputs.size, "several")))
    return Ours(one, several, evaluated, ev_of_one, ev_of_several, any(each.disturbed for each in uses))


def _run_theirs(inputs: Inputs, folder: Path, setting: Setting, seeds: list[int]) -> Theirs:
    folder.mkdir()
    size, d_in, output = inputs.size, inputs.held_out.shape[1], folder / "output"
    job = Job(
        model=str(inputs.model.path),
        hook=size.module.format(layer=size.layer),
        train=str(inputs.train_windows),
        test=str(inputs.test_windows),
        output=str(output),
        seeds=seeds,
        d_in=d_in,
        d_sae=size.expansion * d_in,
        k=size.k,
        context=CONTEXT,
        batch_tokens=BATCH_TOKENS,
        batch_windows=BATCH_WINDOWS,
        training_tokens=size.train_tokens,
        learning_rate=size.learning_rate,
        warm_up_steps=round(WARM_UP * size.train_tokens / BATCH_TOKENS),
        n_batches_in_buffer=_BUFFER_WINDOWS,
        evaluated_batches=size.test_windows // BATCH_WINDOWS if len(seeds) == 1 else 0,
        b_dec=inputs.held_out.mean(dim=0).tolist(),
        sae=setting.sae,
        runner=setting.runner,
    )
    file = folder / "job.json"
    job.write(file)
    paths = [str(Path(__file__).parents[1]), *filter(None, [inputs.environment.get("PYTHONPATH")])]
    environment = {**inputs.environment, "PYTHONPATH": os.pathsep.join(paths)}
    use = run_child([*_THEIRS, str(file)], environment, folder / "log.txt")
    parts = json.loads((output / REPORT).read_text(encoding="utf-8"))["parts"]
    where = [output] if len(seeds) == 1 else [output / str(seed) for seed in seeds]
    found = Theirs(*durations(use, parts), use.peak_bytes, folder_bytes(output), _evs(inputs, where), use.disturbed)
    trained = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} SAEs in one pass"
    say(f"SAELens, {setting.name}, {trained}: {found.until_trained:.1f} s, evaluation {found.evaluation:.1f} s, EV {found.evs[0]:.4f}")
    return found


def durations(use: ChildUse, parts: dict[str, float]) -> tuple[float, float, float, float]:
    """Return the seconds of imports, loading, training and evaluation, which ended at the times in ``parts``. The last has the exit."""
    ends = [use.started, parts["imports"], parts["model"], parts["training"], use.started + use.seconds]
    imports, loading, training, evaluation = (end - start for start, end in pairwise(ends))
    return imports, loading, training, evaluation


def _evs(inputs: Inputs, saes: Sequence[Path]) -> list[float]:
    """Return the explained variance of each SAE on the held-out rows."""
    rows = inputs.held_out
    with torch.no_grad():
        return [sm.metrics.reconstruction(rows, sm.load_sae(path)(rows)).explained_variance for path in saes]


class _Case(NamedTuple):
    name: str
    runner: str
    """End of the peer's name."""
    ours: list[Side]
    theirs: Side
    their_seconds: list[float]
    """Of all of SAELens' runs that do the same."""
    evs: tuple[float, float]
    """Ours and theirs."""


def _rows(size: Size, ours: list[Ours], peer: TheirsOfSetting) -> Iterator[Row]:
    """Give the rows of one setting: the runner for one SAE and once per SAE, and the runner of several; then with evaluation."""
    each, together = peer.each, peer.together
    peak, disk = max(run.peak_bytes for run in each), size.saes * each[0].disk_bytes
    trained = size.saes * statistics.fmean(run.until_trained for run in each)
    evaluation = size.saes * statistics.fmean(run.evaluation for run in each)
    whole = trained + evaluation
    times = [run.until_trained for run in each]
    theirs = statistics.fmean(peer.evs)
    evs, evs_of_multi = ((ours[0].ev_of_several, ev) for ev in (theirs, statistics.fmean(together.evs)))
    multi, evaluated = ", MultiSAETrainingRunner", f"{size.saes} SAEs, evaluated"
    side_of_one = Side(statistics.median(times), peak, each[0].disk_bytes)
    sides = [Side(seconds, peak, disk) for seconds in (trained, whole)]
    seconds_of_multi = together.until_trained, together.until_trained + evaluation
    sides_of_multi = [Side(seconds, together.peak_bytes, together.disk_bytes) for seconds in seconds_of_multi]
    for case in (
        _Case("one SAE", "", [o.one for o in ours], side_of_one, times, (ours[0].ev_of_one, theirs)),
        _Case(f"{size.saes} SAEs", "", [o.several for o in ours], sides[0], [trained], evs),
        _Case(f"{size.saes} SAEs", multi, [o.several for o in ours], sides_of_multi[0], [seconds_of_multi[0]], evs_of_multi),
        _Case(evaluated, "", [o.evaluated for o in ours], sides[1], [whole], evs),
        _Case(evaluated, multi, [o.evaluated for o in ours], sides_of_multi[1], [seconds_of_multi[1]], evs_of_multi),
    ):
        middle = Side(
            statistics.median(side.seconds for side in case.ours),
            max(side.peak_bytes or 0 for side in case.ours),
            max(side.disk_bytes or 0 for side in case.ours),
        )
        ratios = [seconds / side.seconds for seconds in case.their_seconds for side in case.ours]
        yield Row(
            case=case.name,
            against=f"SAELens, {peer.setting.name}{case.runner}",
            settings=peer.setting.text,
            ours=middle,
            theirs=case.theirs,
            ratio=case.theirs.seconds / middle.seconds,
            ratio_range=(min(ratios), max(ratios)),
            rounds=len(ours),
            disturbed_rounds=sum(each.disturbed for each in ours),
            agreement=Agreement(*case.evs, None, TOLERANCE),
        )


def _parts(peer: TheirsOfSetting) -> str:
    """Return how SAELens' time divides."""

    imports, loading, training, evaluation = (statistics.median(part) for part in zip(*(run[:4] for run in peer.each), strict=True))
    together = peer.together
    disturbed = sum(run.disturbed for run in [*peer.each, peer.together])
    load = f" Other processes ran during {disturbed} of {len(peer.each) + 1} runs." if disturbed else ""
    return (
        f"SAELens, {peer.setting.name}, medians of the runs of one SAE: start and imports {imports:.1f} s, loading {loading:.1f} s, "
        f"training with the forward pass {training:.1f} s, evaluation {evaluation:.1f} s. All SAEs in one pass: {together.imports:.1f} s, "
        f"{together.loading:.1f} s, and {together.training:.1f} s.{load}"
    )


def _notes(inputs: Inputs, precision: Precision, ours: list[Ours], peers: list[TheirsOfSetting], folder: Path) -> Iterator[str]:
    folder.mkdir()
    seconds = run_child([sys.executable, "-c", _LOAD, str(inputs.model.path), precision], inputs.environment, folder / "log.txt").seconds
    yield (
        f"Ours: start, imports and loading the language model alone take {seconds:.1f} s. It runs in {precision}, the SAEs in float32. "
        "Texts are tokenised inside our time. Activations are stored in float16 and stay, as do tokens and records: most of our disk. "
        "Kernels were compiled before."
    )
    theirs = "; ".join(
        f"SAELens, {peer.setting.name}, {min(peer.evs):.4f} to {max(peer.evs):.4f}, in one pass {statistics.fmean(peer.together.evs):.4f}"
        for peer in peers
    )
    yield (
        f"Explained variance: ours, mean of {inputs.size.saes}, {ours[0].ev_of_several:.4f}; {theirs}. It is measured on "
        f"{len(inputs.held_out):,} of {inputs.size.test_tokens:,} held-out rows: rows of more than {MAX_NORM:g} times the median norm are "
        "left out. Ours leave them out in training, too (max_norm); SAELens has no option for it."
    )
    yield (
        "Evaluation in SAELens is run_evals, in the process that trained, and for its runner of several the sum of these times; ours is a "
        "second command, `saeens run` of an experiment with the trained SAEs as published members, and has the next-token loss and "
        "variance of the ensembles of the first 1, 2, ... SAEs, and the variance of every SAE."
    )
