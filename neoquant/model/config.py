"""What `config.json` says about a GPT-Neo: the same keys, defaults and rules as Hugging Face's `gpt_neo`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from neoquant.errors import ConfigError, locate
from neoquant.files.reading import read_json
from neoquant.files.writing import write_file
from neoquant.model.config_values import MAX_LAYERS, check_extra, check_values, require
from neoquant.sizes import plural

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "swish", "tanh")
ATTENTION_TYPES = ("global", "local")
# Written where they are not the default.
_OPTIONAL = (
    "pad_token_id",
    "problem_type",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "dtype",
    "num_labels",
)
# transformers accepts both spellings; config.json files in the wild carry the first.
_ALIASES = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "torch_dtype": "dtype"}


class _TakesOthers(type):
    """Keywords that are no fields are taken as config.json's keys are, as in transformers."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        known = {each.name for each in fields(cls)}  # type: ignore[arg-type]  # its classes are dataclasses
        if args or values.keys() <= known:
            return super().__call__(*args, **values)
        extra = values.pop("extra", {})
        return cls.from_dict({**extra, **values})  # type: ignore[attr-defined]


@dataclass
class GPTNeoConfig(metaclass=_TakesOthers):
    """The sizes and switches of one GPT-Neo.

    `attention_types` is the compact form, `[[["global", "local"], 12]]`: each pair is a list of layer types and
    how often it repeats. `attention_layers`, one word a layer, follows from it. `intermediate_size=None` means
    `4 * hidden_size`. Keys this class does not know are kept in `extra` and written back unchanged; they may be given
    as keywords, and read and set as attributes, as in transformers.

    Raises ConfigError where the values contradict each other.
    """

    model_type: ClassVar[str] = "gpt_neo"
    is_encoder_decoder: ClassVar[bool] = False
    sub_configs: ClassVar[dict[str, Any]] = {}

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: list[Any] | None = None
    num_heads: int = 16
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    dtype: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.attention_types is None:
            self.attention_types = [[["global", "local"], 12]]
        check_values({f.name: getattr(self, f.name) for f in fields(self)})
        check_extra(self.extra)
        self._check_shapes()

    def _check_shapes(self) -> None:
        layers = self.attention_layers
        if len(layers) != self.num_layers:
            raise ConfigError(
                f"attention_types describes {plural(len(layers), 'layer')} ({self.attention_types!r:.100}), but "
                f"num_layers is {self.num_layers}: they must agree"
            )
        require(
            self.hidden_size % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of {self.hidden_size=}"
        )
        require(
            self.activation_function in ACTIVATIONS,
            "activation_function",
            self.activation_function,
            f"one of {', '.join(ACTIVATIONS)}",
        )

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name not in extra:
            raise AttributeError(f"a GPTNeoConfig has no {name!r}")
        return extra[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:  # what is set is saved
            self.extra[name] = value

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> GPTNeoConfig:
        """Itself: there is nothing but text (programs for models of several kinds ask)."""
        return self

    @property
    def num_hidden_layers(self) -> int:
        """`num_layers`, as most other models call it."""
        return self.num_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, count: int) -> None:
        self.num_layers = count

    @property
    def num_attention_heads(self) -> int:
        """`num_heads`, as most other models call it."""
        return self.num_heads

    @num_attention_heads.setter
    def num_attention_heads(self, count: int) -> None:
        self.num_heads = count

    @property
    def id2label(self) -> dict[int, str]:
        """Number of a label -> its name, `LABEL_0` where it has none."""
        stated = {str(number): name for number, name in (self.extra.get("id2label") or {}).items()}
        return {number: str(stated.get(str(number), f"LABEL_{number}")) for number in range(self.num_labels)}

    @id2label.setter
    def id2label(self, names: Mapping[int | str, str]) -> None:
        self.extra["id2label"] = {str(number): name for number, name in names.items()}
        self.extra["label2id"] = {name: int(number) for number, name in names.items()}
        self.num_labels = len(names)

    @property
    def label2id(self) -> dict[str, int]:
        """The inverse of `id2label`."""
        return {name: number for number, name in self.id2label.items()}

    @property
    def attention_layers(self) -> list[str]:
        """`"global"` or `"local"` for each layer."""
        return _expand(self.attention_types)

    @property
    def head_dim(self) -> int:
        """Outputs of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Rows of the MLP's first linear."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTNeoConfig:
        """Read the object in a `config.json`.

        Raises ConfigError for another `model_type`, or values that contradict each other.
        """
        model_type = values.get("model_type", "gpt_neo")
        require(model_type == "gpt_neo", "model_type", model_type, '"gpt_neo"')
        values = {_ALIASES.get(key, key): value for key, value in values.items()}
        known = {f.name: f for f in fields(cls) if f.name != "extra"}
        ours: dict[str, Any] = {}
        for key in known.keys() & values.keys():
            # null in a file means "not said", except where None is a legal value of its own.
            if values[key] is not None or known[key].default is None:
                ours[key] = values[key]
        for key in ("bos_token_id", "eos_token_id"):
            if key in values:
                ours[key] = values[key]
        if "id2label" in values and isinstance(values["id2label"], dict) and "num_labels" not in values:
            ours["num_labels"] = max(1, len(values["id2label"]))
        if values.get("attention_layers") is not None and not _states_types(values):
            ours["attention_types"] = _compact(values["attention_layers"])
        derived = ("attention_layers", "model_type")
        extra = {key: value for key, value in values.items() if key not in known and key not in derived}
        try:
            config = cls(**ours, extra=extra)
        except TypeError as error:
            raise ConfigError(f"a value has the wrong type: {error}") from None
        stated = values.get("attention_layers")
        if stated is not None and stated != config.attention_layers:
            raise ConfigError(
                f"attention_layers is {stated!r:.100}, but attention_types gives {config.attention_layers!r:.100}"
            )
        return config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GPTNeoConfig:
        """Read `folder/config.json` (or the file itself)."""
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        values = read_json(path, error=ConfigError)
        with locate(str(path)):
            if not isinstance(values, dict):
                raise ConfigError(f"holds JSON of type {type(values).__name__}, not an object")
            return cls.from_dict(values)

    def __iter__(self) -> Iterator[str]:
        """The names of what `to_dict` gives, as transformers' configurations are gone through."""
        return iter(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The object to write as `config.json`, in transformers' spelling."""
        out: dict[str, Any] = {"model_type": "gpt_neo"}
        for f in fields(self):
            if f.name == "extra":
                continue
            value = getattr(self, f.name)
            if f.name in _OPTIONAL and value == f.default and f.default is not MISSING:
                continue
            out[f.name] = value
        if len(self.extra.get("id2label") or "12") != self.num_labels:
            # transformers derives the number of labels from these, not from num_labels.
            del out["num_labels"]
            out["id2label"] = {str(number): name for number, name in self.id2label.items()}
            out["label2id"] = self.label2id
        out["attention_layers"] = self.attention_layers
        return {**self.extra, **out}

    def to_diff_dict(self) -> dict[str, Any]:
        """Of `to_dict`, what is not as a GPTNeoConfig is by default, and `model_type`."""
        default = type(self)().to_dict()
        return {
            key: value
            for key, value in self.to_dict().items()
            if key == "model_type" or key not in default or default[key] != value
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict`, or `to_dict`, as the text of a file."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | Path, use_diff: bool = True) -> None:
        """Write that."""
        write_file(Path(path), self.to_json_string(use_diff))

    @classmethod
    def from_json_file(cls, path: str | Path) -> GPTNeoConfig:
        """Read such a file."""
        return cls.from_pretrained(path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/config.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / "config.json", use_diff=False)


def _expand(attention_types: Any) -> list[str]:
    layers: list[str] = []
    try:
        for kinds, count in attention_types:
            if len(layers) + len(kinds) * count > MAX_LAYERS:
                raise ConfigError(
                    f"attention_types is {attention_types!r:.100}; at most {MAX_LAYERS:,} layers are legal"
                )
            layers.extend(list(kinds) * count)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"attention_types is {attention_types!r:.100}; legal is a list of [[types], count], "
            'like [[["global", "local"], 12]]'
        ) from None
    unknown = sorted({str(kind) for kind in layers if kind not in ATTENTION_TYPES})
    if unknown:
        raise ConfigError(f"attention_types holds {', '.join(unknown[:3])}; legal are {', '.join(ATTENTION_TYPES)}")
    return layers


def _states_types(values: Mapping[str, Any]) -> bool:
    """Whether `attention_types` says anything: transformers adds its default, of 24 layers, to a file without it."""
    types, layers = values.get("attention_types"), values["attention_layers"]
    default = types == [[["global", "local"], 12]] and values.get("num_layers", 24) != 24
    return types is not None and not (default and len(layers) == values["num_layers"])


def _compact(attention_layers: Any) -> list[Any]:
    """`attention_types` from one word a layer: the shortest run of them that the whole repeats."""
    if not isinstance(attention_layers, list | tuple) or not attention_layers:
        raise ConfigError(f"attention_layers is {attention_layers!r:.100}; legal is a list with a word for each layer")
    layers = list(attention_layers)
    length = next(n for n in range(1, len(layers) + 1) if layers == layers[:n] * (len(layers) // n))
    return [[layers[:length], len(layers) // length]]
