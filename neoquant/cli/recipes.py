"""The recipe that command-line options describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neoquant.cli.options import own_fields
from neoquant.errors import RequestError

if TYPE_CHECKING:
    from neoquant.quantization.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What `quantize` and `plan` take to describe a recipe, as it was typed. None, False or empty: not stated."""

    bits: int | None
    type: str | None
    grid_options: Mapping[str, Any]
    """What is stated of the grid beside bits and type."""
    quantizer: str | None
    named_options: Mapping[str, Any]
    """What is stated of a quantizer by command-line options of their own."""
    quantizer_option: Iterable[str] | None
    """Any options of the quantizer, each `NAME=VALUE`."""
    calibrated: bool
    """Whether there are calibration samples."""
    keep: list[str] | None
    format: str | None
    dtype: str | None
    embeddings: str | None
    recipe: str | None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> RecipeOptions:
        """From the parameters of a verb by name, `typer.Context.params`.

        Grids and quantizers say which of them are theirs; `no_x` is the switch that turns a grid's option `x` off.
        """
        from neoquant.grids import option_names
        from neoquant.quantizers import QUANTIZERS

        set_on = {name: params[name] for name in option_names() if params.get(name, False) is not False}
        set_off = {name: False for name in option_names() if params.get(f"no_{name}")}
        of_quantizers = {name for quantizer in QUANTIZERS.values() for name in quantizer.options()}
        return cls(
            **own_fields(cls, params),
            grid_options=_stated({**set_on, **set_off}),
            named_options=_stated({name: params[name] for name in params if name in of_quantizers}),
            calibrated=params["calibration"] is not None,
        )

    @property
    def fields(self) -> dict[str, Any]:
        """What is stated of the recipe beside its rules."""
        return _stated({"format": self.format, "dtype": self.dtype, "embeddings": self.embeddings})


def choose_recipe(options: RecipeOptions) -> Recipe:
    """The recipe of that name or file, or the simple one that the options describe.

    Raises:
        RequestError: the options contradict each other, or there is no such grid, quantizer or recipe.
    """
    from neoquant.quantization.recipe import Recipe

    if options.recipe is None:
        recipe = _simple(options)
    else:
        refuse_rule_options(options, "--recipe")
        recipe = Recipe.parse({**Recipe.load(options.recipe).model_dump(exclude_unset=True), **options.fields})
    return recipe.keeping(options.keep or (), "--keep")


def refuse_idle_options(params: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise RequestError for options of a calibrated run, among a verb's parameters by name, where there is none."""
    calibrated = any(rule.make_quantizer().needs_calibration for rule in recipe.rules if not rule.keep)
    given = [name for name in ("rows", "length", "seed", "max_memory") if params.get(name) is not None]
    if given and not calibrated and params["calibration"] is None:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RequestError(
            f"{names}: there are no calibration samples without --calibration; add that, or leave these out"
        )


def refuse_rule_options(options: RecipeOptions, decider: str) -> None:
    """Raise RequestError for options that say what the rules of a recipe say, which `decider` decides."""
    chosen = {"bits": options.bits, "type": options.type, "quantizer": options.quantizer}
    more = {"quantizer_option": options.quantizer_option or None}
    stated = _stated({**chosen, **options.grid_options, **options.named_options, **more})
    if stated:
        names = [f"--{'no-' * (value is False)}{name.replace('_', '-')}" for name, value in stated.items()]
        raise RequestError(f"{decider} decides the grids, so {', '.join(names)} cannot be given with it")


def _simple(options: RecipeOptions) -> Recipe:
    """One grid and one quantizer for all layers. `--type QUANTIZER` is short for the affine grid rounded by it."""
    from neoquant.quantization.recipe import Recipe
    from neoquant.quantizers import QUANTIZERS

    bits, type, quantizer = options.bits, options.type, options.quantizer
    if type in QUANTIZERS:
        if quantizer not in (None, type):
            raise RequestError(f"--type {type} is the affine grid and --quantizer {type}, not --quantizer {quantizer}")
        bits, type, quantizer = 4 if bits is None else bits, "affine", type
    texts = _pairs(options.quantizer_option or ())
    named = options.named_options
    if twice := next((name for name in texts if name in named), None):
        raise RequestError(f"--{twice} and --quantizer-option {twice} are the same: give one of them")
    quantizer = quantizer or _implied_quantizer([*named, *texts], options.calibrated)
    bits, type = _complete(bits, type, quantizer)
    return Recipe.simple(
        bits,
        type,
        quantizer=quantizer,
        **options.grid_options,
        **options.fields,
        **named,
        **_parsed(quantizer, texts),
    )


def _implied_quantizer(option_names: list[str], calibrated: bool) -> str | None:
    """The quantizer that calibration samples, or a quantizer's options, ask for."""
    from neoquant.quantizers import CALIBRATED_QUANTIZER, quantizer_with_options

    if calibrated:
        return CALIBRATED_QUANTIZER
    return quantizer_with_options(option_names) if option_names else None


def _pairs(texts: Iterable[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not name or not equals:
            raise RequestError(f"--quantizer-option {name + equals + value!r} is not NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _parsed(quantizer: str | None, texts: Mapping[str, str]) -> dict[str, Any]:
    from neoquant.quantizers import parse_option

    return {} if quantizer is None else {name: parse_option(quantizer, name, text) for name, text in texts.items()}


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _complete(bits: int | None, type: str | None, quantizer: str | None) -> tuple[int, str]:
    """Bits and type where only one of them, or neither, is named: the first that the quantizer does not refuse. An
    illegal pair is passed on to be refused; raises RequestError for bits or a type that no pair has."""
    from neoquant.grids import GRIDS, legal_pairs, make_grid
    from neoquant.quantizers import QUANTIZERS, make_quantizer

    if type is not None and type not in GRIDS:
        rounded = [name for name in QUANTIZERS if make_quantizer(name).refuse(make_grid(4, "affine")) is None]
        legal_types = ", ".join(dict.fromkeys([*GRIDS, *rounded]))
        raise RequestError(f"--type {type!r} is not one of {legal_types}")
    if bits is not None and all(bits != width for width, _ in legal_pairs()):
        pairs = ", ".join(f"{width} {name}" for width, name in legal_pairs())
        raise RequestError(f"--bits {bits}: legal pairs of bits and type are {pairs}")
    rounds = None if quantizer is None else make_quantizer(quantizer)
    for pair in ((4, "nf4"), (8, "int8"), (4, "affine"), *sorted(legal_pairs())):
        legal = bits in (None, pair[0]) and type in (None, pair[1])
        if legal and (rounds is None or rounds.refuse(make_grid(*pair)) is None):
            return pair
    return 4 if bits is None else bits, type or "nf4"
