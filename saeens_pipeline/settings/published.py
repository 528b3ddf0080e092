"""Settings of `ensemble.published`: SAEs that exist, and are loaded instead of trained."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from saeens_pipeline.settings.from_file import FILE, Section

HUB = "hub:"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_KNOWN = ("layer", "seed")


class PublishedSAE(Section):
    """An entry of `ensemble.published`: a member, and with boosting round 1 if it is member 1, that is loaded instead of trained."""

    member: PositiveInt = Field(description="number of the member, from 1; member 1 is round 1 of boosting, too")
    sae: str = Field(
        description="folder or file of an SAE of SAELens, sparsify, dictionary_learning or Gemma Scope, or hub:OWNER/REPO/PATH@REVISION; "
        "{layer} and {seed} stand for layer and ensemble seed; relative paths start from the experiment file's folder"
    )

    @field_validator("sae")
    @classmethod
    def _known_placeholders(cls, sae: str, info: ValidationInfo) -> str:
        unknown = [name for name in _PLACEHOLDER.findall(sae) if name not in _KNOWN]
        if unknown:
            raise ValueError(f"{{{unknown[0]}}} stands for nothing: {{layer}} and {{seed}} are replaced")
        if not sae.strip():
            raise ValueError("give a folder, a file, or hub:OWNER/REPO/PATH@REVISION")
        if sae.count("{") != len(_PLACEHOLDER.findall(sae)) or sae.count("}") != sae.count("{"):
            raise ValueError("a brace is not closed: {layer} and {seed} are replaced")
        if "://" in sae or sae.lower().startswith(HUB) != sae.startswith(HUB):
            raise ValueError("write hub:OWNER/REPO/PATH@REVISION for the hub, and a path for what is here")
        file = (info.context or {}).get(FILE)
        if sae.startswith(HUB):
            from saeens_models.interop.hub import Place  # it loads torch, which importing this module does not

            Place.parse(sae)
            return sae
        path = Path(sae).expanduser()
        return os.path.normpath(Path(file).parent / path if file else path.absolute())

    def depends_on(self, name: str) -> bool:
        """Return whether the place differs by `layer` or `seed`."""
        return name in _PLACEHOLDER.findall(self.sae)

    def at(self, layer: int | None, seed: int | None) -> str:
        """Return the place of the SAE of one partition."""
        return self.sae.replace("{layer}", str(layer)).replace("{seed}", str(seed))
