"""What every section of a run's JSON is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

Positive = Annotated[int, Field(gt=0)]
PerLayer = Positive | list[Positive]
Probability = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A frozen section: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)


def by_name(default: str) -> Discriminator:
    """Sections of one key are told apart by their `name`; one without a name is `default`."""

    def name(section: Any) -> Any:
        return section.get("name", default) if isinstance(section, dict) else getattr(section, "name", None)

    return Discriminator(name)
