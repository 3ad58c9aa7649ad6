"""What a sweep's file may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


class Tracking(BaseModel):
    """The `tracking` key of a config: `wandb`, or `{wandb: offline, project: mine, entity: team}`. Never part of a cell's identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    wandb: Literal["online", "offline"] = "online"
    project: str = Field(default="dfqbench", pattern=r"^[A-Za-z0-9_.-]{1,100}$")
    entity: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$", description="a W&B user or team; default: the one that is logged in")

    @model_validator(mode="before")
    @classmethod
    def _by_name_alone(cls, given: Any) -> Any:
        return {} if given == "wandb" else given

    def run_id(self, cell_id: str) -> str:
        return f"{self.project}-{cell_id}"


class Budget(BaseModel):
    """What every method that trains gets, whatever its own defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int | None = Field(default=None, ge=0)
    iterations: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=2)

    def given(self) -> dict[str, int]:
        return {k: v for k, v in self.model_dump().items() if v is not None}


class Kept(BaseModel):
    """The `store` key of a config: what a finished cell leaves behind beside its numbers. Never part of a cell's identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("students", mode="before")
    @classmethod
    def _off_in_other_words(cls, given: Any) -> Any:
        return "off" if given is False or given in ("no", "none") else given

    students: Literal["last", "off"] = Field(default="last", description="the quantized network after its last epoch as student.safetensors, or off")


class NamedSet(BaseModel):
    """An evaluation set with the name that tables are to give it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    set: str
    name: str | None = Field(default=None, min_length=1)


class Called(BaseModel):
    """What tables call a row, and where it belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str = Field(default="", description="what the row is called")
    group: str = Field(default="", description="rows of the group `reference` stand first in tables")

    @model_validator(mode="before")
    @classmethod
    def _label_alone(cls, given: Any) -> Any:
        return {"label": given} if isinstance(given, str) else given


class Selection(BaseModel):
    """Synthetic images on which `dfqbench select` compares settings: a method with its settings, a seed that nothing else has, how many."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    images: str | dict[str, dict[str, Any] | None]
    seed: int = 1000
    count: int = Field(1280, ge=1)


class RealImages(BaseModel):
    """An entry of `yardsticks`: real images in a method's place."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    images: str = Field(description="an evaluation set: of one with training images these, of a folder all")
    count: int = Field(1280, ge=2)


class BitBudget(BaseModel):
    """An entry of `bits` that leaves the width of each tensor to an allocator."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    average_weight_bits: float = Field(ge=2, le=8, description="of all weights that the protocol does not fix, each counted alike")
    activations: int = Field(ge=2, le=8, description="bits of activations; their average where these are allocated too")
    allocate: str | dict[str, dict[str, Any] | None] = Field(description="an allocator, alone or with its settings")
    allocate_activations: bool = Field(False, description="whether each activation has a width of its own, too")

    @field_validator("average_weight_bits")
    @classmethod
    def _two_decimals(cls, given: float) -> float:
        if given != round(given, 2):
            raise ValueError("two decimals at most")
        return int(given) if given == int(given) else given

    @field_validator("allocate")
    @classmethod
    def _one_allocator(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) != 1:
            raise ValueError("one allocator with its settings is expected, like {dnq: {updates: 100}}")
        return given

    def __str__(self) -> str:
        """As cells have it: `w4a4`, `w3.5a4`."""
        return f"w{self.average_weight_bits:g}a{self.activations}"

    @property
    def allocator(self) -> tuple[str, dict[str, Any]]:
        """Its name and the settings that it is given."""
        name, settings = (self.allocate, None) if isinstance(self.allocate, str) else next(iter(self.allocate.items()))
        return name, dict(settings or {})


def _kind(given: Any) -> str:
    return "average" if isinstance(given, dict | BitBudget) else "str"


Width = Annotated[Annotated[str, Tag("str")] | Annotated[BitBudget, Tag("average")], Discriminator(_kind)]
WITHOUT_DATA = "none"  # for `evaluate`


def unseen_images(count: int = 64, method: str = "gznq") -> dict[str, Any]:
    """`selection` of a sweep without data that has none of its own: images of asked classes (gznq), all kept, or of any kind (zeroq)."""
    few = {
        "gznq": {"images": count, "synthesis_batch": count, "synthesis_iterations": 150, "confidence": 0.0},
        "zeroq": {"images": count, "synthesis_iterations": 200},
    }
    return {"images": {method: few[method]}, "count": count}


class Sweep(BaseModel):
    """A config file's content. See configs/ for examples."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    teachers: list[str | dict[str, Any]] = Field(min_length=1)
    evaluate: NamedSet
    methods: list[str | dict[str, dict[str, Any] | str | None]] = Field(min_length=1)
    labels: dict[str, Called] = Field({}, description="what tables call rows, by their name without a label; no part of any cell")
    bits: list[Width] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    protocol: str | dict[str, Any] = "lineage"
    preset: str | None = Field(None, description="the methods' own set of defaults, where a method has one of that name: imagenet")
    budget: Budget = Budget()
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    evaluate_every: int | None = Field(None, ge=1, description="epochs between evaluations; null: only at the end")
    selection: Selection | None = Field(None, description="for `dfqbench select`; no part of any cell")
    allocation: Selection = Field(
        Selection(**unseen_images(512), seed=2000), description="synthetic images that bit widths are chosen on: a half chooses, a half checks"
    )
    yardsticks: dict[str, RealImages] = Field({}, description="real images by the name by which a `host` names them; no data-free methods")
    plugins: list[str] = Field([], description="Python files that register more methods or evaluation sets")
    tracking: Tracking | None = Field(
        None, description="W&B: wandb, or {wandb: online or offline, project: ..., entity: ...}; never changes a result"
    )
    store: Kept = Field(Kept(), description="what a finished cell leaves behind beside its numbers: {students: last or off}")

    @model_validator(mode="before")
    @classmethod
    def _images_without_data(cls, given: Any) -> Any:
        """Where there is no evaluation set, students are compared with their teacher on images that somebody has to make."""
        without = isinstance(given, dict) and given.get("evaluate") == WITHOUT_DATA
        return {**given, "selection": given.get("selection") or unseen_images()} if without else given

    @field_validator("evaluate", mode="before")
    @classmethod
    def _set_without_a_name(cls, given: Any) -> Any:
        return {"set": given} if isinstance(given, str) else given


def tracking_of(sweep: Sweep, given: str | None) -> Tracking | None:
    """What a run tracks: as the config says, unless `given` (online, offline or off) says otherwise."""
    if given is None:
        return sweep.tracking
    return None if given == "off" else (sweep.tracking or Tracking()).model_copy(update={"wandb": given})
