"""Ensembles of SAEs: bagging (the mean of the members) and boosting (each member fits the residual of the earlier ones).

An ensemble reconstructs ``sum_j alpha_j * g_j``. It equals one SAE whose dictionary stacks the members' dictionaries and whose code
concatenates their codes, each scaled by its alpha (Gadgil, Lin & Lee, Ensembling Sparse Autoencoders, arXiv 2505.16077).
Members may differ in architecture and in number of features, not in ``d_in``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, overload

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from saeens_models.architectures import SAE, load_sae, save_sae
from saeens_models.architectures.weight_files import in_words
from saeens_models.sparse_code import SparseCode

ENSEMBLE_FILE = "ensemble.json"
_MOST_MEMBERS = 1000


class FeatureOrigin(NamedTuple):
    """Origin of a feature of an ensemble: feature ``index`` of ``ensemble[member]``. Both count from 0."""

    member: int
    """Position of the member."""
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class PrefixReconstruction(NamedTuple):
    """Reconstruction by the first ``n_members`` members of an ensemble, and the input and output of the last of them."""

    n_members: int
    """Number of members: 1 to the size of the ensemble."""
    x_hat: Tensor
    """`[n, d_in]`: reconstruction of the ensemble of these members."""
    code: SparseCode
    """Unscaled code `[n, d_sae]` of the last member."""
    given: Tensor
    """`[n, d_in]`: input of the last member, x itself or the residual of the earlier rounds."""
    given_hat: Tensor
    """`[n, d_in]`: reconstruction of ``given`` by the last member."""


class Ensemble(nn.Module, ABC):
    """Several SAEs that encode and decode as one.

    A sequence of SAEs: ``ensemble[0]`` is an SAE, ``ensemble[:3]`` the ensemble of the first three, with shared weights.

    Raises ``ValueError`` without members or for different ``d_in``, and ``TypeError`` for a member that is not an SAE.
    """

    kind: ClassVar[Literal["bagging", "boosting"]]
    """Name in saved files."""
    sequential: ClassVar[bool]
    """True if a member depends on earlier ones: only the first n members form an ensemble."""

    def __init__(self, members: Iterable[SAE]) -> None:
        super().__init__()
        saes = list(members)
        if not saes:
            raise ValueError("an ensemble needs at least one member")
        for position, sae in enumerate(saes):
            if not isinstance(sae, SAE):
                raise TypeError(f"members must be SAEs; member {position} is {type(sae).__name__}")
        widths = [sae.config.d_in for sae in saes]
        if len(set(widths)) > 1:
            raise ValueError(f"members must share one d_in; got {widths}")
        self.members = nn.ModuleList(saes)

    @property
    @abstractmethod
    def member_weight(self) -> float:
        """Factor alpha of every member in the sum."""

    @abstractmethod
    def prefix_reconstructions(self, x: Tensor) -> Iterator[PrefixReconstruction]:
        """Yield the reconstruction of rows x `[n, d_in]` by the ensemble of the first n members, for n = 1 .. J, in one pass.

        Memory: that of encoding x with one member (pre-activations `[n, d_sae]`), and a few tensors of the size of x.
        """

    @abstractmethod
    def member_codes(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the members' unscaled codes of x `[..., d_in]` in member order: `[..., d_sae]` each."""

    def encode(self, x: Tensor, scaled: bool = True) -> Tensor:
        """Return the concatenated code `[..., n_features]` of x `[..., d_in]`.

        Codes are multiplied by ``member_weight``, so that ``decode`` returns the ensemble's reconstruction. ``scaled=False`` returns the
        members' own codes, for probes: a factor would change the strength of their regularisation.
        """
        weight = self.member_weight if scaled else 1.0
        return torch.cat([z if weight == 1.0 else z * weight for z in self.member_codes(x)], dim=-1)

    def decode(self, z: Tensor) -> Tensor:
        """Return ``z @ W_dec + b_dec`` `[..., d_in]` of a scaled code `[..., n_features]`. Raises ``ValueError`` for another width."""
        if z.ndim == 0 or z.shape[-1] != self.n_features:
            raise ValueError(
                f"z has shape {list(z.shape)}, its last dimension must be the {self.n_features} features of the {len(self)} members"
            )
        codes = z.split([sae.config.d_sae for sae in self], dim=-1)
        return sum((code @ sae.W_dec for code, sae in zip(codes, self, strict=True)), start=self.b_dec)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return the ensemble's reconstruction of x, both `[..., d_in]`: ``decode(encode(x))`` without the concatenated code."""

    @property
    def d_in(self) -> int:
        """Size of the activations."""
        return self[0].config.d_in

    @property
    def n_features(self) -> int:
        """Number of features of all members together."""
        return self.offsets[-1]

    @property
    def d_sae(self) -> int:
        """``n_features``, under the name that tools for one SAE ask for."""
        return self.n_features

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self[0].b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return self[0].b_dec.dtype

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata that all members have alike, such as model_name and hook_name."""
        first, *others = (sae.metadata for sae in self)
        return {name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)}

    @property
    def offsets(self) -> list[int]:
        """J + 1 numbers: member j has the features ``offsets[j]`` to ``offsets[j + 1] - 1``; ``offsets[n]`` features in n members."""
        return list(accumulate((sae.config.d_sae for sae in self), initial=0))

    @property
    def W_dec(self) -> Tensor:
        """The members' dictionaries stacked, `[n_features, d_in]`: a copy. Rows keep the members' norms."""
        return torch.cat([sae.W_dec for sae in self])

    @property
    def W_enc(self) -> Tensor:
        """The members' encoders side by side, `[d_in, n_features]`: a copy. Those of later rounds of boosting encode residuals."""
        return torch.cat([sae.W_enc for sae in self], dim=1)

    @property
    def b_dec(self) -> Tensor:
        """``sum_j alpha_j * decoder_bias_j``, `[d_in]`."""
        return torch.stack([sae.decoder_bias for sae in self]).sum(0) * self.member_weight

    def feature(self, i: int) -> FeatureOrigin:
        """Return the member of feature ``i`` (0 to ``n_features - 1``), and its index there. Raises ``IndexError`` out of range."""
        if not 0 <= i < self.n_features:
            raise IndexError(f"feature {i} does not exist: the ensemble has features 0 to {self.n_features - 1}")
        offsets = self.offsets
        member = max(j for j in range(len(self)) if offsets[j] <= i)
        return FeatureOrigin(member, i - offsets[member])

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[SAE]:
        return iter(self.members)  # pyright: ignore[reportReturnType]  # the constructor checks that they are SAEs

    @overload
    def __getitem__(self, index: int) -> SAE: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> SAE | Self:
        saes = list(self)
        if not isinstance(index, slice):
            if not -len(saes) <= index < len(saes):
                raise IndexError(f"member {index} does not exist: the ensemble has members 0 to {len(saes) - 1}")
            return saes[index]
        positions = range(len(saes))[index]
        if self.sequential and positions != range(len(positions)):
            raise ValueError(
                f"[{index.start}:{index.stop}:{index.step}] leaves out earlier rounds, on whose residual the later ones were trained: "
                f"only the first n rounds form a {self.kind} ensemble, as in ensemble[:n]"
            )
        return type(self)(saes[index])


class Bagging(Ensemble):
    """The mean of its members: ``x_hat = 1/J * sum_j g_j(x)``, so alpha = 1/J and ``b_dec`` is the mean of the members'."""

    kind = "bagging"
    sequential = False

    @property
    def member_weight(self) -> float:
        return 1.0 / len(self)

    def member_codes(self, x: Tensor) -> Iterator[Tensor]:
        return (sae.encode(x) for sae in self)

    def prefix_reconstructions(self, x: Tensor) -> Iterator[PrefixReconstruction]:
        total = torch.zeros_like(x)
        for n, sae in enumerate(self, start=1):
            code, of_member = sae.reconstruct(x)
            total = total + of_member
            yield PrefixReconstruction(n, total / n, code, given=x, given_hat=of_member)

    def forward(self, x: Tensor) -> Tensor:
        return sum((sae(x) for sae in self), start=torch.zeros_like(x)) / len(self)


class Boosting(Ensemble):
    """Rounds applied in turn: ``r_1 = x``, ``r_{j+1} = r_j - g_j(r_j)``, ``x_hat = sum_j g_j(r_j)``; alpha = 1.

    The code of round j is its code of ``r_j``, so encoding is sequential as training was.
    """

    kind = "boosting"
    sequential = True

    @property
    def member_weight(self) -> float:
        return 1.0

    def member_codes(self, x: Tensor) -> Iterator[Tensor]:
        for sae in self:
            z = sae.encode(x)
            yield z
            x = x - sae.decode(z)

    def prefix_reconstructions(self, x: Tensor) -> Iterator[PrefixReconstruction]:
        residual, x_hat = x, torch.zeros_like(x)
        for n, sae in enumerate(self, start=1):
            code, of_residual = sae.reconstruct(residual)
            x_hat = x_hat + of_residual
            yield PrefixReconstruction(n, x_hat, code, given=residual, given_hat=of_residual)
            residual = residual - of_residual

    def forward(self, x: Tensor) -> Tensor:
        return x - self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        """Return the residual ``r_{J+1}`` of x after all rounds, both `[..., d_in]`, subtracted round by round as in training."""
        for sae in self:
            x = x - sae(x)
        return x


class _Manifest(BaseModel):
    """Content of ``ensemble.json``: kind of ensemble and folders of its members."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1]
    kind: Literal["bagging", "boosting"]
    members: Annotated[list[Annotated[str, Field(pattern=r"^(\.\./)?[a-z0-9_]{1,200}$")]], Field(min_length=1, max_length=_MOST_MEMBERS)]
    """Folders inside this one, or next to it: several ensembles may refer to the same SAEs."""


def save_ensemble(ensemble: Ensemble, path: str | Path) -> None:
    """Write a self-contained ensemble into the folder ``path``, which is created if it is missing.

    ``ensemble.json`` names the kind and the members in order. Each member is a folder in SAELens format, ``member_1`` .. ``member_J``,
    with its weights as safetensors. Existing files are overwritten.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / ENSEMBLE_FILE
    # Without its manifest the folder is not an ensemble: an interrupted save cannot be mistaken for a complete one.
    manifest.unlink(missing_ok=True)
    names = [f"member_{j}" for j in range(1, len(ensemble) + 1)]
    for name, sae in zip(names, ensemble, strict=True):
        save_sae(sae, folder / name)
    manifest.write_text(_Manifest(format_version=1, kind=ensemble.kind, members=names).model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_ensemble(path: str | Path) -> Bagging | Boosting:
    """Load the ensemble in the folder ``path`` on the CPU, with members inside the folder or next to it (``../NAME``).

    A member that the manifest names twice is loaded once. Raises ``FileNotFoundError`` if the folder or a member is missing. Raises
    ``ValueError`` for an invalid manifest, and for members that do not fit together or cannot be read.
    """
    folder = Path(path)
    file = folder / ENSEMBLE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: an ensemble is a folder with {ENSEMBLE_FILE} and one folder per member")
    try:
        manifest = _Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{file}: {in_words(error, 'file')}") from error
    loaded = {name: load_sae(folder / name) for name in dict.fromkeys(manifest.members)}
    saes = [loaded[name] for name in manifest.members]
    try:
        return Bagging(saes) if manifest.kind == "bagging" else Boosting(saes)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
