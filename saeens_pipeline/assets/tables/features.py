"""The table of single features: how often each fires, where it comes back, and on which tokens it is most active."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Op, Task, Workplace
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.assets.sources import language_model_of
from saeens_pipeline.assets.tables.evaluation import Subject, load_dictionary
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import frame

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from tokenizers import Tokenizer
    from torch import Tensor

    from saeens_models.ensembles import Ensemble
    from saeens_models.metrics import FeatureActivity, MemberMatches

TOP_TOKENS = 10  # of each feature
_REPLACEMENT = "\ufffd"  # what bytes that are no character are decoded to
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def features_op(subject: Subject) -> Op:
    """Declare the table of all features of a layer: all seeds, since it says whether a feature comes back under another.

    It is made from SAEs alone, as `stability` is. The text and the activations that it reads are behind these, and change their data
    versions; as inputs, with the partitions of the activations, it would be made again in their run, before the SAEs are.
    Memory, whatever the number of test tokens: one method's dictionaries of all seeds, twice; 136 bytes for each feature of one of them,
    12 more for each member that it is compared with, and 28 for each feature of all seeds; and the rows, of about 300 bytes per feature
    and seed, with 20 more for each other member.
    """
    experiment = subject.experiment
    features = subject.declare("features", subject.dictionaries, dimensions="layer")

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        import polars as pl

        (task,) = tasks
        with workplace.compute.measure() as measurement:
            features_of = _Features(workplace, subject, TokenStrings(workplace.store, subject))
            table = pl.concat([features_of.rows(task.partition, method) for method in _methods(subject)])
        workplace.store.write_table(*task.where, task.recipe, workplace.provenance() | vars(measurement), table)

    return Op(f"{experiment.name}__eval__features", (features,), make, on_device=True)


class _Method(NamedTuple):
    """What features belong to: its name and size in the table, and its dictionary."""

    name: str
    n_members: int
    dictionary: Declaration


def _methods(subject: Subject) -> list[_Method]:
    ensembles = [_Method(name, subject.experiment.ensemble.members, getattr(subject, name)) for name in ("bagging", "boosting")]
    return ensembles + [_Method(*baseline) for baseline in subject.baselines]


@dataclass(frozen=True)
class _Features:
    """Makes rows of the table."""

    workplace: Workplace
    subject: Subject
    tokens: TokenStrings

    def rows(self, partition: Partition, method: _Method) -> pl.DataFrame:
        """The features of one method under all seeds."""
        import numpy as np
        import polars as pl

        from saeens_models.metrics import nearest_in_other_runs

        seeds = self.subject.experiment.ensemble.seeds
        parts: list[pl.DataFrame] = []
        dictionaries: list[list[Tensor]] = []
        for where in (Partition(partition.layer, seed) for seed in seeds):
            ensemble = load_dictionary(self.workplace, method.dictionary, where)
            parts += self._rows_of_seed(where, method, ensemble)
            dictionaries.append([sae.W_dec.detach() for sae in ensemble])
        rows = pl.concat(parts)
        if len(dictionaries) == 1:
            return rows
        run, member, row, cosine = (
            np.concatenate([column.cpu().numpy() for column in of_runs])
            for of_runs in zip(*nearest_in_other_runs(dictionaries), strict=True)
        )
        return rows.with_columns(
            nearest_other_seed_cosine=cosine.astype(float),
            nearest_other_seed=np.array(seeds)[run],
            nearest_other_seed_member=member + 1,
            nearest_other_seed_index=row,
        )

    def _rows_of_seed(self, partition: Partition, method: _Method, ensemble: Ensemble) -> Iterator[pl.DataFrame]:
        """Member by member, without the comparison with other seeds."""
        import polars as pl

        from saeens_models.metrics import matches_in_other_members

        store, dictionary = self.workplace.store, method.dictionary
        is_ensemble = dictionary.builder == "ensemble"
        saes = self.subject.members(store, dictionary, partition) if is_ensemble else [store.require(dictionary.address, partition)]
        matches = matches_in_other_members([sae.W_dec for sae in ensemble]) if len(ensemble) > 1 else [None]
        empty = frame("features", [])
        for number, (sae, activity, of_member) in enumerate(
            zip(saes, self._activity(partition, method, ensemble), matches, strict=True), start=1
        ):
            near = None if of_member is None else of_member.nearest()
            columns: dict[str, Any] = {
                "index": range(len(activity.density)),
                "density": activity.density.cpu().numpy(),
                "mean_activation": activity.mean_activation.cpu().numpy(),
                "nearest_member": None if near is None else near.member.cpu().numpy() + 1,
                "nearest_cosine": None if near is None else near.cosine.cpu().numpy(),
                "matches": None if of_member is None else _match_lists(of_member),
                "top_tokens": self.tokens.lists(activity.top_tokens),
            }
            same = self.subject.row(store, partition, method.name, method.n_members, [sae.data_version]) | {"member": number}
            rows = pl.DataFrame(columns).with_columns(pl.lit(value).alias(column) for column, value in same.items())
            rows = rows.with_columns(pl.col("mean_activation").fill_nan(None))
            rows = pl.concat([empty, rows], how="diagonal_relaxed")  # what is compared between seeds is null so far
            yield rows.select(empty.columns).cast(empty.schema)  # pyright: ignore[reportArgumentType]  # a schema is what cast takes

    def _activity(self, partition: Partition, method: _Method, ensemble: Ensemble) -> list[FeatureActivity]:
        """Of every member, in one pass over the test activations."""
        from saeens_models.evaluation import feature_activity

        reader, device = open_reader(self.workplace.store, self.subject.activations, partition), ensemble[0].W_dec.device
        of = method.name if len(ensemble) > 1 else method.dictionary.address.name
        label = f"{self.subject.experiment.name}/eval/features of {of}, {partition}"
        with progress.task(label, reader.n_rows("test")) as advance:

            def chunks() -> Iterator[Tensor]:
                for chunk in reader.chunks("test"):
                    yield chunk.to(device)
                    advance(len(chunk))

            return feature_activity(ensemble, chunks(), TOP_TOKENS)


def _match_lists(matches: MemberMatches) -> list[str]:
    """For each feature a JSON list of [member, index, cosine], with members from 1."""
    others = [j for j, rows in enumerate(matches.row.tolist()) if rows[0] >= 0]
    rows = zip(matches.row[others].T.tolist(), matches.cosine[others].T.tolist(), strict=True)
    return [
        f"[{', '.join(f'[{j + 1}, {index}, {cosine:.4f}]' for j, index, cosine in zip(others, indices, cosines, strict=True))}]"
        for indices, cosines in rows
    ]


class TokenStrings:
    """The text of test tokens, as the language model's tokenizer decodes each alone; of parts of a character, their bytes as `<0xE2>`."""

    def __init__(self, store: Store, subject: Subject) -> None:
        from saeens_pipeline.language_models.tokens import load_tokenizer, open_tokens

        tokens = store.require(subject.tokens.address, Partition())
        self.store, self._tokenizer = open_tokens(tokens.path), load_tokenizer(language_model_of(tokens))
        self._literals: dict[int, str] = {}

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer: the language model may have room for more."""
        return self._tokenizer.get_vocab_size()

    def literals(self, ids: np.ndarray) -> list[str]:
        """JSON strings of these token ids `[n]`."""
        return [self._literal(token) for token in ids.tolist()]

    def _literal(self, token: int) -> str:
        if token not in self._literals:
            self._literals[token] = json.dumps(token_text(self._tokenizer, token), ensure_ascii=False)
        return self._literals[token]

    def lists(self, rows: Tensor) -> list[str]:
        """For each feature a JSON list of strings, of activation rows `[n_features, n]`, of which -1 is none."""
        import numpy as np

        wanted, place = np.unique(rows.cpu().numpy(), return_inverse=True)
        ids = np.full(len(wanted), -1)
        ids[wanted >= 0] = self.store.token_ids("test", wanted[wanted >= 0])
        return [f"[{', '.join(self.literals(of_feature[of_feature >= 0]))}]" for of_feature in ids[place.reshape(tuple(rows.shape))]]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token says alone. Bytes that are only a part of a character are written out as `<0xE2>`, as SentencePiece names such tokens.

    Tokenizers that know no bytes give what they give.
    """
    text, name = tokenizer.decode([token], skip_special_tokens=False), tokenizer.id_to_token(token)
    if _REPLACEMENT not in text or name is None:
        return text
    if _BYTE.fullmatch(name):
        return name
    try:
        data = bytes(_bytes_of_characters()[character] for character in name)
    except KeyError:
        return text
    return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", data.decode(errors="surrogateescape"))


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte that a character stands for in the names of byte-level tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
