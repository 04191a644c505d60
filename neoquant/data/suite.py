"""A suite names what is evaluated and how: data, subsets, documents, protocol, context. One TOML file each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neoquant.data.pile import pile_subsets
from neoquant.errors import DataError, RequestError
from neoquant.files.reading import read_toml
from neoquant.sizes import plural

Protocol = Literal["rolling", "joined", "strided", "last-word"]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # TOML arrays arrive as lists


class Strict(BaseModel):
    """A frozen value: unknown keys and values of another type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StdlibData(Strict):
    """The running Python's own library: subset -> module names, subset -> pydoc topics."""

    kind: Literal["stdlib"]
    modules: dict[str, Names] = {}
    topics: dict[str, Names] = {}


class FileData(Strict):
    """A `.jsonl` or `.jsonl.zst` file in the Pile's form, a `.txt` or `.raw` file, or a folder of these."""

    kind: Literal["file"]
    path: str


class HubData(Strict):
    """A split of a hub data set whose rows have the Pile's form, at one commit."""

    kind: Literal["hub"]
    dataset: str
    split: str
    revision: str
    config: str | None = None  # of a data set that has several


class Suite(Strict):
    """What to evaluate on. `None` leaves a choice to the model (context) or sets no limit (documents)."""

    name: str
    description: str = ""
    protocol: Protocol = "rolling"
    context: int | None = Field(None, ge=2)  # tokens
    stride: int | None = Field(None, ge=1)  # tokens; strided only
    subsets: Names = ()  # none named: all that the data holds
    documents: int | None = Field(None, ge=1)  # at most so many of each subset
    characters: int | None = Field(None, ge=1)  # at most so many of each document, from its beginning
    collection: Literal["pile"] | None = None  # whose subsets can be named before anything is read
    prepare: Literal["wikitext"] | None = None  # what is done to the text first
    sha256: str | None = None  # of the documents, where the data cannot be pinned
    data: Annotated[StdlibData | FileData | HubData, Field(discriminator="kind")]

    @model_validator(mode="after")
    def _stride_fits(self) -> Suite:
        if self.stride is not None and self.protocol != "strided":
            raise ValueError(f"stride belongs to the strided protocol, not to {self.protocol}")
        if self.stride is not None and self.context is not None and self.stride >= self.context:
            raise ValueError(f"stride {self.stride} must be less than the context, {self.context}")
        return self

    @classmethod
    def of_file(cls, path: str | Path) -> Suite:
        """A file's documents, rolling, in the model's whole context."""
        fields: dict[str, Any] = {"name": Path(path).name, "data": {"kind": "file", "path": str(path)}}
        return cls(**fields)

    def override(
        self,
        *,
        file: str | Path | None = None,
        subsets: tuple[str, ...] | None = None,
        documents: int | None = None,
        protocol: Protocol | None = None,
        context: int | None = None,
        stride: int | None = None,
    ) -> Suite:
        """This suite with what is given put in place; another file brings its own name and subsets.

        Raises RequestError where the values do not fit together.
        """
        fields = self.model_dump()
        if file is not None:
            data = {"kind": "file", "path": str(file)}
            fields |= {"data": data, "subsets": (), "collection": None}
            if self.prepare is None and self.protocol != "last-word":  # else the suite says what is done with the text
                fields |= {"name": Path(file).name, "description": ""}
        if subsets is not None and fields["collection"] == "pile":
            subsets = pile_subsets(subsets)
        given = {"subsets": subsets, "documents": documents, "protocol": protocol, "context": context, "stride": stride}
        fields |= {key: value for key, value in given.items() if value is not None}
        if file is not None or subsets is not None or documents is not None:
            fields["sha256"] = None
        if fields["protocol"] != "strided" and stride is None:
            fields["stride"] = None
        try:
            return Suite(**fields)
        except ValidationError as error:
            raise RequestError(f"suite {self.name}: {_reasons(error)}") from None

    def fitted(self, positions: int) -> Suite:
        """This suite with context and stride settled for a model of so many positions.

        Raises RequestError if the suite's windows are longer than the model's context.
        """
        if positions < 2:
            raise RequestError(
                f"the model has {plural(positions, 'position')}, and text is scored in windows of 2 tokens or more"
            )
        context = self.context or positions
        if context > positions:
            raise RequestError(
                f"suite {self.name} asks for a context of {plural(context, 'token')}, but the model has "
                f"{plural(positions, 'position')}: "
                f"give a context of at most {positions}"
            )
        stride = (self.stride or context // 2) if self.protocol == "strided" else None
        return self.override(context=context, stride=stride)


def load_suite(name: str | Path) -> Suite:
    """The suite of that name, or in that `.toml` file; a file's relative data path starts at the file's folder.

    Raises RequestError for a name that does not exist, DataError for a file that is not a suite.
    """
    if str(name) in suite_names():
        path = _folder() / f"{name}.toml"
    else:
        path = Path(name)
        if path.suffix != ".toml" or not path.is_file():
            raise RequestError(f"no suite {str(name)!r}: give one of {', '.join(suite_names())}, or a .toml file")
    fields = read_toml(path, error=DataError)
    try:
        suite = Suite.model_validate(fields)
    except ValidationError as error:
        raise DataError(f"{path}: {_reasons(error)}") from None
    if isinstance(suite.data, FileData):
        data = FileData(kind="file", path=str(path.parent / suite.data.path))
        return suite.model_copy(update={"data": data})
    return suite


def suite_names() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def _folder() -> Path:
    """Where the suites lie: inside the installed package, or in `eval/suites` of a source checkout."""
    installed = Path(__file__).parent / "suites"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "eval" / "suites"


def _reasons(error: ValidationError) -> str:
    def reason(detail: Any) -> str:
        place = ".".join(str(part) for part in detail["loc"])
        found = "" if detail["type"] in ("missing", "value_error") else f" (found {detail['input']!r:.200})"
        message = detail["msg"].removeprefix("Value error, ")
        return f"{place}: {message}{found}" if place else message

    return "; ".join(reason(detail) for detail in error.errors())
