"""Growth of training time with the number of SAEs, their width, and the tokens."""

from __future__ import annotations

import math

from benchmarks.options import Options
from benchmarks.peers import PeerSetting, Workload, training_peers
from benchmarks.report import Section
from benchmarks.runner import Effort, Row
from benchmarks.synthetic import SyntheticActivations
from benchmarks.training import compare_steps

TITLE = "Growth"
_PEER = "SAELens, sparse"
_WORKLOAD, _QUICK_WORKLOAD = Workload("topk", 384, 4096, 32), Workload("topk", 192, 2048, 16, batch_tokens=1024)
_N_SAES, _QUICK_N_SAES = (1, 2, 4, 8, 16), (1, 2, 4)
_D_SAE, _QUICK_D_SAE = (2048, 4096, 8192, 16384, 32768, 65536), (1024, 2048, 4096)
_STEPS, _QUICK_STEPS = (4, 8, 16, 32), (1, 2, 4)
_BUDGET = Effort(rounds=3, budget_seconds=15)


def run(options: Options) -> Section:
    """Measure three series around one workload against SAELens' fastest setting in float32. Without SAELens, return no rows."""
    workload = _QUICK_WORKLOAD if options.quick else _WORKLOAD
    peers = training_peers(workload)
    settings = [setting for setting in peers.settings if setting.label == _PEER]
    if not settings:
        return Section(TITLE, f"Needs {_PEER.split(',', maxsplit=1)[0]}.", [], peers.left_out)
    effort = options.effort if options.quick else _BUDGET
    rows: list[Row] = []
    notes: list[str] = []
    for name, series, n_points in (
        ("SAEs", _saes, _QUICK_N_SAES if options.quick else _N_SAES),
        ("d_sae", _widths, _QUICK_D_SAE if options.quick else _D_SAE),
        ("tokens", _tokens, _QUICK_STEPS if options.quick else _STEPS),
    ):
        measured = [series(workload, settings[0], point, effort) for point in n_points]
        rows += measured
        notes.append(f"From the first to the last point, time grows with {name} to the power {_exponent(n_points, measured)}.")
    about = f"Series around {workload} in batches of {workload.batch_tokens}, on {SyntheticActivations.description}."
    return Section(TITLE, about, rows, notes=notes)


def _saes(workload: Workload, setting: PeerSetting, n_saes: int, effort: Effort) -> Row:
    return compare_steps(workload, setting, SyntheticActivations(workload.d_in), n_saes=n_saes, steps=1, effort=effort)


def _widths(workload: Workload, setting: PeerSetting, d_sae: int, effort: Effort) -> Row:
    return compare_steps(workload._replace(d_sae=d_sae), setting, SyntheticActivations(workload.d_in), n_saes=1, steps=1, effort=effort)


def _tokens(workload: Workload, setting: PeerSetting, steps: int, effort: Effort) -> Row:
    return compare_steps(workload, setting, SyntheticActivations(workload.d_in), n_saes=1, steps=steps, effort=effort, per_step=False)


def _exponent(points: tuple[int, ...], rows: list[Row]) -> str:
    """Return the slopes in the log-log plot, ours and theirs."""
    span = math.log(points[-1] / points[0])
    ours = math.log(rows[-1].ours.seconds / rows[0].ours.seconds) / span
    if rows[0].theirs is None or rows[-1].theirs is None:
        return f"{ours:.2f}"
    return f"{ours:.2f} (theirs {math.log(rows[-1].theirs.seconds / rows[0].theirs.seconds) / span:.2f})"
