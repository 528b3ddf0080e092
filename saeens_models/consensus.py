"""The consensus dictionary: the features that several members of an ensemble have in common, as one SAE."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import accumulate, combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeens_models.architectures import SAE, SAEConfig, build_sae
from saeens_models.metrics.cosines import cosine_blocks, unit_dictionaries
from saeens_models.training import TrainingConfig, train

_TIE = 1e-6
"""Cosines that differ by less are equal: two features are always equally near to their mean."""


class Cluster(NamedTuple):
    """Features of different members that point in one direction."""

    features: tuple[tuple[int, int], ...]
    """Member and row of each feature, from 0, in member order: at most one per member."""
    representative: int
    """Position in ``features`` of the one that is nearest to the mean direction of all; the first of equals."""


class Consensus(NamedTuple):
    """A consensus SAE, and the features of the members that each of its features stands for."""

    sae: SAE
    clusters: list[Cluster]
    """In the order of the SAE's features."""


def consensus(
    saes: Sequence[SAE], batches: Iterable[Tensor], training: TrainingConfig, threshold: float = 0.7, min_members: int = 2
) -> Consensus:
    """Return the SAE of the features that at least ``min_members`` of the SAEs have in common; see ``find_clusters``.

    Its decoder rows are those of the representatives. Encoder and biases start from the representatives' and are trained on ``batches``
    (activations `[n, d_in]`, as for ``train``) with the decoder fixed. Architecture and L0 are those of the SAEs, with at most as many
    active features as there are clusters. After arXiv 2606.12138.

    Raises ``ValueError`` for SAEs of different architectures or L0, and if no feature is common to ``min_members`` of them.
    """
    sae = initial_consensus(saes, clusters := find_clusters([each.W_dec for each in saes], threshold, min_members))
    fixed = training.model_copy(update={"frozen": "decoder", "unit_norm_decoder": False})
    (trained,) = train([sae.config], batches, fixed, initial=[sae])
    return Consensus(trained, clusters)


def find_clusters(W_decs: Sequence[Tensor], threshold: float = 0.7, min_members: int = 2) -> list[Cluster]:
    """Return the clusters of similar features of at least ``min_members`` members, greedily, the largest first.

    W_decs: the members' dictionaries `[d_sae, d_in]` in order; sizes may differ. A feature's partners are the features of other members of
    signed cosine at least ``threshold``. The feature with partners in most members, the first of equals, forms a cluster with the nearest
    partner of each. Its features are taken away, and so on. Memory: a block of cosines, and about 200 bytes per pair of partners.

    Raises ``ValueError`` for fewer than two members, for a ``min_members`` that they cannot reach or that is below 2, and for a threshold
    out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a cosine above 0, at most 1; got {threshold}")
    if not 2 <= min_members <= len(W_decs):
        raise ValueError(f"min_members must be between 2 and the number of members, {len(W_decs)}; got {min_members}")
    units = unit_dictionaries([W_dec.detach() for W_dec in W_decs])
    offsets = list(accumulate((len(unit) for unit in units), initial=0))
    member_of = [member for member, unit in enumerate(units) for _ in range(len(unit))]
    partners = _partners(units, offsets, threshold)

    def available(feature: int) -> dict[int, int]:
        """Return the nearest partner of each member that is not in a cluster yet."""
        nearest: dict[int, int] = {}
        for partner in partners[feature]:
            if not taken[partner]:
                nearest.setdefault(member_of[partner], partner)
        return nearest

    taken = [False] * offsets[-1]
    queue = [(-len(available(feature)), feature) for feature in range(offsets[-1]) if len(partners[feature]) >= min_members - 1]
    heapq.heapify(queue)
    clusters: list[Cluster] = []
    while queue:
        expected, feature = heapq.heappop(queue)
        nearest = {} if taken[feature] else available(feature)
        if len(nearest) < min_members - 1:
            continue
        if len(nearest) < -expected:  # clusters since then have taken some of its partners
            heapq.heappush(queue, (-len(nearest), feature))
            continue
        features = sorted([feature, *nearest.values()])
        for each in features:
            taken[each] = True
        places = tuple((member_of[each], each - offsets[member_of[each]]) for each in features)
        rows = torch.stack([units[member][row] for member, row in places])
        to_mean = rows @ rows.mean(0)
        clusters.append(Cluster(places, int((to_mean > to_mean.max() - _TIE).nonzero()[0])))
    return clusters


def initial_consensus(saes: Sequence[SAE], clusters: Sequence[Cluster], config: SAEConfig | None = None) -> SAE:
    """Return an SAE with the representatives' weights, and the mean of weights that belong to no feature, such as b_dec.

    ``config``: that of the members' training, with any width; None: the first member's. It matters where SAEs are saved as another
    architecture, as BatchTopK is. Raises ``ValueError`` for SAEs of different architectures or L0, and without clusters.
    """
    architectures = sorted({sae.config.architecture for sae in saes})
    if len(architectures) != 1:
        raise ValueError(f"a consensus needs SAEs of one architecture; got {', '.join(architectures)}")
    if (field := saes[0].config.l0_field) and len(l0s := {getattr(sae.config, field) for sae in saes}) > 1:
        raise ValueError(f"a consensus needs SAEs of one {field}; got {', '.join(sorted(map(str, l0s)))}")
    if not clusters:
        raise ValueError("no feature is common to enough members: there is nothing to form a consensus of")
    sae = build_sae(with_width(config or saes[0].config, len(clusters)))
    chosen = [cluster.features[cluster.representative] for cluster in clusters]
    states = [each.state_dict() for each in saes]
    with torch.no_grad():
        for name, weight in sae.state_dict().items():
            if name not in states[0] or states[0][name].ndim != weight.ndim:
                continue  # a threshold that training finds
            if name == "W_enc":
                weight.copy_(torch.stack([states[member][name][:, row] for member, row in chosen], 1))
            elif name == "b_dec" or weight.ndim == 0:
                weight.copy_(torch.stack([state[name] for state in states]).mean(0))
            else:
                weight.copy_(torch.stack([states[member][name][row] for member, row in chosen]))
    return sae


def with_width(config: SAEConfig, d_sae: int) -> SAEConfig:
    """Return a configuration with another number of features, of which at most all are active per token."""
    fields: dict[str, Any] = {"d_sae": d_sae}
    if config.l0_field and (l0 := getattr(config, config.l0_field)) is not None:
        fields[config.l0_field] = min(l0, d_sae)
    return type(config)(**{**config.model_dump(), **fields})


def _partners(units: Sequence[Tensor], offsets: Sequence[int], threshold: float) -> list[list[int]]:
    """Return for each feature, counted through all members, its partners in other members, the nearest first."""
    found: list[list[tuple[float, int]]] = [[] for _ in range(offsets[-1])]
    for i, j in combinations(range(len(units)), 2):
        for rows, columns, cosines in cosine_blocks(units[i], units[j]):
            pairs = torch.nonzero(cosines >= threshold)
            values = cosines[pairs[:, 0], pairs[:, 1]].tolist()
            for (row, column), value in zip(pairs.tolist(), values, strict=True):
                a, b = offsets[i] + rows.start + row, offsets[j] + columns.start + column
                found[a].append((-value, b))
                found[b].append((-value, a))
    return [[feature for _, feature in sorted(each)] for each in found]
