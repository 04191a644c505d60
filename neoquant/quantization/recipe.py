"""What a user asks for: which layer goes on which grid, by which quantizer, into which format.

A recipe is a frozen value, written in TOML::

    name = "nf4-mixed"
    format = "auto"                     # auto | bitsandbytes | gptq | compressed-tensors | neoquant
    dtype = "auto"                      # of what is not quantized: auto | float16 | bfloat16
    embeddings = "auto"                 # of the token embedding and the head: auto | keep | int8 | nf4

    [[rules]]
    match = "transformer.h.0.*"         # a glob over layer names; the first rule that matches a layer decides
    keep = true                         # half precision

    [[rules]]
    match = "*"
    bits = 4
    type = "nf4"
    block_size = 64                     # these two for nf4 and fp4; left out, the grid's own default
    double_quant = true
    # group_size = 128                  # these three for type = "affine"
    # symmetric = false
    # float_zero = false
    quantizer = "nearest"
    # order = "static"                  # the quantizer's own options; these for quantizer = "gptq"
    # scales = "range"
    # damping = 0.01
    # objective = "attention"
    # correction = 0.0

Layers are named as in the causal language model (`transformer.h.0.attn.attention.q_proj`), whatever the checkpoint's
head.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from neoquant.errors import RecipeError, locate
from neoquant.files.names import LEGAL_NAME, is_safe_name, safe_name
from neoquant.files.reading import read_toml

if TYPE_CHECKING:
    from neoquant.grids import Grid
    from neoquant.quantizers import Quantizer

# The keys of formats.NAMED, which would import torch.
FormatChoice = Literal[
    "auto", "bitsandbytes", "gptq", "compressed-tensors", "neoquant", "bnb4", "bnb8", "packed", "gptq-v1", "gptq-v2"
]
DtypeChoice = Literal["auto", "float16", "bfloat16"]
EmbeddingsChoice = Literal["auto", "keep", "int8", "nf4"]


@dataclass(frozen=True)
class Origin:
    """What a rule was made of, for messages: the option that was typed. No part of what the rule says."""

    words: str | None = field(default=None, compare=False)


class Rule(BaseModel):
    """What happens to the layers that `match`: `keep` them in half precision, or quantize them to `bits` of `type`.

    Keys beside the fields are options of the grid or of the quantizer, as their classes declare them.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    _origin: Origin = PrivateAttr(default=Origin())

    match: str = Field(min_length=1)
    keep: bool = False
    bits: int | None = None
    type: str | None = None
    quantizer: str = "nearest"

    @property
    def options(self) -> dict[str, Any]:
        """What is stated of the quantizer's options."""
        return {key: value for key, value in (self.model_extra or {}).items() if key not in self.grid_options}

    @property
    def grid_options(self) -> dict[str, Any]:
        """What is stated of the grid's options."""
        from neoquant.grids import option_names

        legal = option_names()
        return {key: value for key, value in (self.model_extra or {}).items() if key in legal}

    def matches(self, layer: str) -> bool:
        """Whether the glob covers `layer`, given by the layer's own name or by its weight's (`... .weight`)."""
        return fnmatchcase(layer, self.match) or fnmatchcase(f"{layer}.weight", self.match)

    def grid(self) -> Grid:
        """The grid that the rule asks for.

        Raises:
            RequestError: there is no such grid; the message names the legal ones.
        """
        from neoquant.grids import make_grid

        if self.bits is None or self.type is None:
            raise RecipeError("a rule that keeps layers has no grid")
        return make_grid(self.bits, self.type, **self.grid_options)

    def make_quantizer(self) -> Quantizer:
        """The quantizer that the rule asks for.

        Raises:
            RequestError: there is no such quantizer, or no such option or value of it; the message names the legal.
        """
        from neoquant.quantizers import make_quantizer

        return make_quantizer(self.quantizer, **self.options)

    def check(self) -> None:
        """Refuse a rule that says nothing, says two things at once, or asks for what does not exist.

        Raises:
            RequestError: naming what is missing, too much, or illegal.
        """
        self._refuse_unknown()
        if self.keep:
            stated = sorted(self.model_fields_set - {"match", "keep"})
            if stated:
                raise RecipeError(f"keep = true leaves a layer in half precision, so {', '.join(stated)} cannot apply")
            return
        absent = [key for key in ("bits", "type") if getattr(self, key) is None]
        if absent:
            raise RecipeError(f"{' and '.join(absent)} missing: a rule needs bits and type, or keep = true")
        if reason := self.refusal():
            raise RecipeError(reason)

    def refusal(self) -> str | None:
        """Why the quantizer of a rule that quantizes cannot round to its grid, or None."""
        return self.make_quantizer().refuse(self.grid())

    def _refuse_unknown(self) -> None:
        """Keys that are neither a rule's nor an option of any grid or quantizer."""
        from neoquant.grids import option_names
        from neoquant.quantizers import QUANTIZERS

        options = [*option_names(), *(key for cls in QUANTIZERS.values() for key in cls.options())]
        for key in self.model_extra or {}:
            if key not in options:
                raise RecipeError(_unknown(key, [*type(self).model_fields, *options]))


def _require_safe(name: str) -> str:
    if not is_safe_name(name):
        raise ValueError(f"should be part of a folder's name, so {LEGAL_NAME}")
    return name


class Recipe(BaseModel):
    """A whole request. Build one with `simple`, `load`, `from_toml` or `parse`, which check it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(_require_safe)]
    description: str = ""
    format: FormatChoice = "auto"
    dtype: DtypeChoice = "auto"
    embeddings: EmbeddingsChoice = "auto"
    rules: tuple[Rule, ...] = Field(min_length=1, strict=False)

    @classmethod
    def simple(
        cls,
        bits: int = 4,
        type: str = "nf4",
        *,
        quantizer: str | None = None,
        keep: Iterable[str] = (),
        format: FormatChoice = "auto",
        dtype: DtypeChoice = "auto",
        embeddings: EmbeddingsChoice = "auto",
        **options: str | float | bool | None,
    ) -> Recipe:
        """One grid for every block linear except those that match a glob of `keep`.

        `options` are those of the grid (block_size and double_quant; group_size, symmetric and float_zero) and of the
        quantizer; None is its own default.

        Raises:
            RequestError: no such grid, a parameter that it does not have, or a value of another kind.
        """
        stated = {"bits": bits, "type": type, "quantizer": quantizer, **options}
        everything = {"match": "*", **{key: value for key, value in stated.items() if value is not None}}
        try:
            rule = Rule.model_validate(everything)
        except ValidationError as error:
            raise RecipeError("; ".join(_fault(detail) for detail in error.errors())) from error
        rule.check()  # here, so that the message does not speak of a rule nobody wrote
        named = rule.grid().label
        if quantizer not in (None, "nearest"):
            named = f"{quantizer}{named.removeprefix(type)}" if type == "affine" else f"{named}-{quantizer}"
        if embeddings not in ("auto", "keep"):
            named = f"{named}-{embeddings}-embeddings"
        recipe = cls.parse(
            {"name": named, "format": format, "dtype": dtype, "embeddings": embeddings, "rules": [everything]}
        )
        recipe.rules[0]._origin = Origin("")
        return recipe.keeping(keep)

    def keeping(self, globs: Iterable[str], said: str = "keep") -> Recipe:
        """The same recipe, but for layers that match one of `globs`, which stay in half precision.

        `said` is how messages call what asked for it.

        Raises:
            RecipeError: a glob is empty.
        """
        kept = []
        for glob in globs:
            if not glob:
                raise RecipeError(f"{said} '' is empty: name layers, for example '*.c_proj'")
            kept.append(Rule(match=glob, keep=True))
            kept[-1]._origin = Origin(f"{said} {glob!r}")
        return self.model_copy(update={"rules": (*kept, *self.rules)})

    @classmethod
    def of(cls, recipe: Recipe | str | Path) -> Recipe:
        """A recipe, as it is or by `load`. Raises RecipeError for what is neither."""
        if isinstance(recipe, cls):
            return recipe
        if isinstance(recipe, str | Path):
            return cls.load(recipe)
        raise RecipeError(f"recipe is of type {type(recipe).__name__}; legal is a Recipe, a recipe's name or its file")

    @classmethod
    def load(cls, recipe: str | Path) -> Recipe:
        """The recipe of that name among the ones that come with neoquant, or the file of that path.

        Raises:
            RecipeError: there is neither, or the file is not a recipe.
        """
        if str(recipe) in recipe_names():
            return cls.from_toml(_shelf() / f"{recipe}.toml")
        if not Path(recipe).exists():
            raise RecipeError(f"{recipe}: no such file, and no recipe of that name: {', '.join(recipe_names())}")
        return cls.from_toml(recipe)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe file. Unknown keys are errors; a missing `name` is the file's.

        Raises:
            RecipeError: the file cannot be read, is not TOML, or is not a recipe; the message begins with its path.
        """
        path = Path(path)
        data = read_toml(path, error=RecipeError)
        with locate(str(path)):
            return cls.parse({"name": safe_name(path.stem), **data})

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Recipe:
        """A checked recipe from plain values (as `tomllib` reads them).

        Raises:
            RequestError: with every fault of form in one line, or the first illegal rule.
        """
        try:
            recipe = cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError("; ".join(_fault(detail) for detail in error.errors())) from error
        for number, rule in enumerate(recipe.rules, 1):
            with locate(rule_place(number, rule)):
                rule.check()
        return recipe

    def to_toml(self) -> str:
        """The recipe as TOML that `from_toml` reads back to an equal value."""
        lines = list(_toml_lines(self.model_dump(exclude={"rules"})))
        for rule in self.rules:
            lines += ["", "[[rules]]", *_toml_lines(rule.model_dump(exclude_unset=True))]
        return "\n".join(lines) + "\n"

    def rule_for(self, layer: str) -> Rule | None:
        """The rule that decides about `layer`: the first that matches, None if none does."""
        return next((rule for rule in self.rules if rule.matches(layer)), None)

    def complaints(self, layers: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """Why rules cannot be carried out: the quantizer refuses the grid, or the rule would change nothing.

        Args:
            layers: names of the layers that may be quantized.
            others: names of the layers that are kept in half precision whatever the recipe says.
        """
        layers, others = list(layers), list(others)
        deciding = [self.rule_for(layer) for layer in layers]
        faults = []
        for number, rule in enumerate(self.rules, 1):
            decided = [layer for layer, decider in zip(layers, deciding, strict=True) if decider is rule]
            if decided:
                reason = _why_refused(rule, decided)
            elif rule._origin.words == "":
                continue  # the one rule of `simple`: if all is kept, the rules that keep it are to be spoken of
            else:
                reason = _why_idle(rule, layers, others)
            if reason is not None:
                faults.append(f"{rule_place(number, rule)}: {reason}")
        return faults


def recipe_names() -> list[str]:
    """Names of the recipes that come with neoquant."""
    return sorted(path.stem for path in _shelf().glob("*.toml"))


def rule_place(number: int, rule: Rule) -> str:
    """How messages call a rule."""
    return rule._origin.words or f"rule {number} (match = {rule.match!r})"


def _shelf() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def _why_refused(rule: Rule, layers: list[str]) -> str | None:
    """Why a rule cannot be carried out on the layers that it decides about, or None."""
    reason = None if rule.keep else rule.refusal()
    if reason is None:
        return None
    return f"{reason} ({layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''})"


def _why_idle(rule: Rule, layers: list[str], others: list[str]) -> str | None:
    """Why a rule that decides about no layer does not; None if that is no fault."""
    if any(rule.matches(layer) for layer in layers):
        if rule._origin.words:
            return "every layer it matches is kept already"
        return "every layer it matches is decided by an earlier rule; put it before that one"
    among_others = [name for name in others if rule.matches(name)]
    if among_others:
        instead = "it stays in half precision"
        if among_others[0].endswith((".wte", "lm_head")):
            instead = "a rule decides about the blocks' linear layers, embeddings = ... about this"
        return None if rule.keep else f"{among_others[0]} cannot be quantized, {instead}"
    closest = difflib.get_close_matches(rule.match, layers, n=3, cutoff=0.0)
    return f"matches no layer; the closest are {', '.join(closest)}"


def _fault(detail: Any) -> str:
    """One of pydantic's findings in our words: `rules 2: block_size: ...`."""
    steps = [str(step + 1) if isinstance(step, int) else str(step) for step in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        return _unknown(steps[-1], list(Recipe.model_fields))
    return f"{' '.join(steps)}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r:.200}"


def _unknown(key: str, known: list[str]) -> str:
    meant = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {meant[0]!r}?" if meant else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _toml_lines(values: Mapping[str, str | float | bool]) -> Iterator[str]:
    """`key = value` for each value that says something. TOML spells these types as JSON does, but for DEL."""
    for key, value in values.items():
        if value != "":
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007F")
