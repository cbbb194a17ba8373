"""What the models of the spec are made of: their base, and the texts with a unit."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Duration = Annotated[str, Field(pattern=r"^(\d+(ms|s|m|h))+$", max_length=32)]
Fraction = Annotated[str, Field(pattern=r"^\d+(\.\d+)?$", max_length=16)]
Quantity = Annotated[
    str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$", max_length=32)
]
OptionalQuantity = Annotated[
    str, Field(pattern=r"^([0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?)?$", max_length=32)
]


class Model(BaseModel):
    """A frozen part of the spec, written in camel case; an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True
    )
