"""`autointerp`: which language model explains features, how many, and what asking it costs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

_SET_HERE = ("model", "messages", "n", "stream")  # of a request
_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prices(BaseModel):
    """`autointerp.prices`: what a million tokens cost, in any currency."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: _Price = Field(description="of a million tokens that are sent")
    output: _Price = Field(description="of a million tokens that are answered")


class AutoInterpSettings(BaseModel):
    """The fields of `autointerp`. The first four decide the table; the others only how it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="what the endpoint calls the model, such as gpt-4o-mini")
    features: PositiveInt = Field(200, description="features of each ensemble, layer and seed, drawn among those that fire")
    control: bool = Field(True, description="whether each feature is also scored with the explanation of another")
    parameters: dict[str, Any] = Field(
        {"temperature": 0, "max_tokens": 500}, description="fields of a chat completion that are sent with every request, instead of these"
    )
    requests_at_once: int = Field(8, ge=1, le=1024, description="requests that wait for an answer at one time")
    timeout_seconds: float = Field(120, gt=0, allow_inf_nan=False, description="that an answer may take")
    retries: int = Field(8, ge=0, le=100, description="of a request that fails for what may pass, such as 429")
    prices: Prices | None = Field(None, description="of a million tokens: the estimates name a price")

    @field_validator("parameters")
    @classmethod
    def _not_set_here(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        taken = [name for name in parameters if name in _SET_HERE or "key" in name.lower()]
        if taken:
            raise ValueError(f"{', '.join(taken)}: cannot be set here; the key is read from SAEENS_LLM_API_KEY")
        return parameters

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the table."""
        return self.model_dump(mode="json", include={"model", "features", "control", "parameters"})
