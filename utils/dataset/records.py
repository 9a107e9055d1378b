"""What the files of a dataset hold, as types against which they are checked when they are read. Imports no torch."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta, Struct

from utils.classes import FACTOR

FORMAT = "imagenet-sd dataset 1"
MOST_IMAGES = 10_000_000  # of a class
Text = Annotated[str, Meta(max_length=4000)]  # as a cell of a class table


class Entry(TypedDict):
    """A line of a manifest."""

    id: str
    index: int
    prompt: NotRequired[str]
    seed: NotRequired[int]
    attempt: NotRequired[int]  # 0 if the first draw was kept
    rejected: NotRequired[list[str]]  # why each earlier one was not
    safety: NotRequired[bool | None]  # what the safety checker says
    bytes: int
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class ClassRecord(Struct):
    """A class in dataset.json."""

    id: str
    name: Text
    hypernym: Text
    definition: Text
    images: Annotated[int, Meta(ge=0, le=MOST_IMAGES)]


class RecipeRecord(Struct):
    """Of the recipe what is read here; utils/generation/recipe.py has all of it."""

    classes: str
    prompt: str
    images_per_class: Annotated[int, Meta(ge=1)] | Annotated[str, Meta(pattern=f"^(imagenet|{FACTOR.pattern})$")]
    scheduler: str
    steps: int
    guidance_scale: float
    batch_size: Annotated[int, Meta(ge=1, le=MOST_IMAGES)]
    format: Literal["jpg", "png", "webp"]


class ModelRecord(Struct):
    """The model, with {path: sha256} of its files."""

    id: str
    revision: str | None
    files: dict[str, str]


class Record(Struct):
    """dataset.json, without what is only for people."""

    format: Literal["imagenet-sd dataset 1"]
    name: str
    recipe: RecipeRecord
    model: ModelRecord
    classes: Annotated[list[ClassRecord], Meta(min_length=1)]
    environment: dict[str, Any]


class SessionRecord(Struct):
    """Of a line of sessions.jsonl what is added up."""

    images: Annotated[int, Meta(ge=0)]
    seconds: Annotated[float, Meta(ge=0)]
    flops: Annotated[float, Meta(ge=0)] | None = None  # of what was drawn, redraws included
    cpu_joules: Annotated[float, Meta(ge=0)] | None = None
    gpu_joules: Annotated[float, Meta(ge=0)] | None = None
