"""Base classes of what a record consists of: sets of fields that are validated and stored as JSON."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

# JSON has both; a record that is written again has the same bytes only if an integer stays an integer.
# Larger integers cannot become floats.
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Number = Integer | float


class Model(BaseModel):
    """A set of fields that is validated and has no others."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with these fields changed."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return type(self).model_validate(fields | changes)


class Section(Model):
    """A section of a record, or a group of values in one. It cannot be changed."""

    model_config = ConfigDict(frozen=True)

    def to_json(self) -> dict[str, Any]:
        """Return the plain values to store, without the fields that were never set."""
        return self.model_dump(by_alias=True, exclude_unset=True)
