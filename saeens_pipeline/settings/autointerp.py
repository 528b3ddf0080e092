"""Settings of `autointerp`: the language model that explains features, the number of features, and prices."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator

from saeens_pipeline.settings.from_file import Section

_RESERVED = ("model", "messages", "n", "stream")  # request fields that the pipeline sets
_Price = Annotated[float, Field(ge=0)]


class Prices(Section):
    """`autointerp.prices`: prices per million tokens, in any currency."""

    input: _Price = Field(description="price of a million tokens sent")
    output: _Price = Field(description="price of a million tokens received")


class AutoInterpSettings(Section):
    """`autointerp`: explanations of features by a language model. The first four fields decide the table, the others do not."""

    model: str = Field(min_length=1, description="name of the model at the endpoint, such as gpt-4o-mini")
    features: PositiveInt = Field(200, description="number of features per ensemble, layer and seed, drawn from those that fire")
    control: bool = Field(True, description="true: score each feature also with the explanation of another feature")
    parameters: dict[str, Any] = Field(
        {"temperature": 0, "max_tokens": 500}, description="fields of a chat completion in every request; replace the default fields"
    )
    requests_at_once: int = Field(8, ge=1, le=1024, description="number of concurrent requests")
    timeout_seconds: float = Field(120, gt=0, description="longest time to wait for an answer, in seconds")
    retries: int = Field(8, ge=0, le=100, description="number of retries of a request after a temporary failure, such as status 429")
    prices: Prices | None = Field(None, description="prices per million tokens, for cost estimates; default: estimates in tokens only")

    @field_validator("parameters")
    @classmethod
    def _not_set_here(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        taken = [name for name in parameters if name in _RESERVED or "key" in name.lower()]
        if taken:
            raise ValueError(f"{', '.join(taken)}: cannot be set here; the key is read from SAEENS_LLM_API_KEY")
        try:
            json.dumps(parameters, allow_nan=False)
        except ValueError:
            raise ValueError("a number is not finite, and JSON has none such") from None
        return parameters

    @property
    def decisive(self) -> dict[str, Any]:
        """The fields that decide the table."""
        return self.model_dump(mode="json", include={"model", "features", "control", "parameters"})
