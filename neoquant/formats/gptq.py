"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write and read them: affine grids of one kind in a checkpoint.

The byte level is docs/formats.md. `checkpoint_format` "gptq" (v1) stores every zero less one, so that it cannot hold
a zero of 0; "gptq_v2" stores it as it is. Symmetric checkpoints are written as v1, which more programs read, others
as v2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant import packing
from neoquant.errors import FormatError, RequestError, locate
from neoquant.formats.base import Format, Layout, require_shape, require_suffixes, require_tensor
from neoquant.formats.int32_packing import half_scales, order_of, to_bytes, to_words
from neoquant.grids import Affine, Grid
from neoquant.tensor import QuantizedTensor

V1, V2 = "gptq", "gptq_v2"
PACKINGS = {
    "auto": V1,
    "auto_round:gptq": V1,
    "auto_round:auto_gptq": V1,
    "auto_round:gptqmodel": V2,
    "auto_round": V2,
}
"""AutoRound's `packing_format` -> the version in which it stores zeros: its own, and GPTQModel's, as they are."""
STATES_VERSION = ("checkpoint_format", "format", "packing_format")
"""The keys of a `quantization_config` that say in which version zeros are stored; the first that is there counts."""
MULTIPLE = 32  # of inputs and outputs: whole words at every number of bits


class GptqFormat(Format):
    """Affine linears whose sides are multiples of 32."""

    name: ClassVar[str] = "gptq"
    family: ClassVar[str] = "gptq"
    markers: ClassVar[tuple[str, ...]] = (".qweight", ".g_idx")
    stems: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales", ".g_idx")
    other_methods: ClassVar[tuple[str, ...]] = ("awq",)
    holds_order: ClassVar[bool] = True

    def __init__(self, said: Mapping[str, Any] | None = None, version: str | None = None) -> None:
        """`said` is the `quantization_config` of the checkpoint to be read: the tensors alone do not say everything.

        `version` is what to write, `V1` or `V2`; None takes the one that holds the grid and that more programs read.
        """
        self.said = dict(said or {})
        self.version = version

    def configured(self, said: Mapping[str, Any]) -> Format:
        return GptqFormat(said)

    def checked(
        self, layers: Mapping[str, Iterable[str]], view: Callable[[str], Tensor]
    ) -> tuple[Format, tuple[str, ...]]:
        """Symmetric zeros are all the same number, which shows the version that they are stored in.

        Programs have written v2's zeros under v1's label, and the other way; every weight would be off by its scale.
        """
        grid, stated = self._stated()
        if not grid.symmetric:
            return self, ()
        shown: dict[str, str | None] = {}
        for layer in (layer for layer, suffixes in layers.items() if ".qzeros" in suffixes):
            with locate(layer):
                shown[layer] = _version_of(view(f"{layer}.qzeros"), grid)
        versions = set(shown.values()) - {None}
        if len(versions) > 1:
            first, other = (next(layer for layer in shown if shown[layer] == version) for version in (V1, V2))
            raise FormatError(f"qzeros of {first} are of checkpoint_format {V1}, and those of {other} of {V2}")
        if not versions or stated in versions or None in shown.values():
            return self, ()
        (version,) = versions
        said = {key: value for key, value in self.said.items() if key != "format"} | {"checkpoint_format": version}
        verb = "says" if self.said.keys() & set(STATES_VERSION) else "leaves it at"
        note = f"qzeros are of checkpoint_format {version!r}, as sym: true shows, and config.json {verb} {stated!r}"
        return GptqFormat(said), (f"{note}; they are read as {version!r}",)

    def refuse(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        if not isinstance(grid, Affine):
            return f"the GPTQ format holds affine grids, not {grid.name}"
        if grid.float_zero:
            return "the GPTQ format stores zeros among the codes, not as float16; format neoquant holds them"
        if shape[0] % MULTIPLE or shape[1] % MULTIPLE:
            return f"the GPTQ format needs multiples of {MULTIPLE} inputs and outputs, not {shape[1]} and {shape[0]}"
        return None

    def refuse_all(self, grids: Mapping[str, Grid]) -> str | None:
        kinds = list(dict.fromkeys(grids.values()))
        if len(kinds) > 1:
            return f"a GPTQ checkpoint has one number of bits, group size and symmetry, not {kinds[0]} and {kinds[1]}"
        return None

    def refuse_tensor(self, q: QuantizedTensor) -> str | None:
        reason = super().refuse_tensor(q)
        if reason is None and "zero" in q.params and self._written(q.grid) == V1 and not q.params["zero"].all():
            return "a zero of 0 would be stored as -1 in v1 of the GPTQ format; v2 holds it"
        return reason

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        self._require_holdable(q)
        assert isinstance(q.grid, Affine)
        codes, columns = q.codes, torch.arange(q.shape[1], dtype=torch.int32)
        g_idx = columns // q.grid.width(q.shape[1])
        if q.order is not None:
            at = q.order.long()
            codes = torch.empty_like(codes).index_copy_(1, at, codes)
            g_idx = torch.empty_like(g_idx).index_copy_(0, at, g_idx)
        zeros = q.params.get("zero", torch.full_like(q.params["scale"], q.grid.middle, dtype=torch.uint8))
        if self._written(q.grid) == V1:
            zeros = zeros - 1
        return {
            ".qweight": to_words(codes, q.grid.bits).T.contiguous(),
            ".qzeros": to_words(zeros.T, q.grid.bits),
            ".scales": q.params["scale"].T.contiguous(),
            ".g_idx": g_idx,
        }

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        grid, version = self._stated()
        tensors = self._with_groups(tensors, grid)
        require_suffixes(tensors, (".qweight", ".qzeros", ".scales", ".g_idx"))
        rows, columns = _shape(tensors)
        require_shape((rows, columns), shape)
        if reason := self.refuse(grid, (rows, columns)):
            raise FormatError(reason)
        for suffix, spec in self.layout(grid, (rows, columns)).items():
            if suffix != ".scales":
                require_tensor(suffix.removeprefix("."), tensors[suffix], *spec)
        codes = packing.unpack(to_bytes(tensors[".qweight"].T), grid.bits, columns)
        zeros = packing.unpack(to_bytes(tensors[".qzeros"]), grid.bits, rows)
        if version == V1:
            zeros = self._one_more(tensors[".qzeros"], zeros, grid)
        scale = half_scales("scales", tensors[".scales"], (zeros.shape[0], rows))
        if grid.symmetric and bool((zeros == grid.middle).all()):
            params = {"scale": scale.T.contiguous()}
        else:  # whatever is said: the zeros decide what the weight is
            grid = Affine(grid.bits, grid.group_size, False)
            params = {"scale": scale.T.contiguous(), "zero": zeros.T.contiguous()}
        order = order_of("g_idx", tensors[".g_idx"], grid.width(columns))
        codes = codes if order is None else codes[:, order.long()]
        return QuantizedTensor(codes.contiguous(), grid, params, order, dtype)

    def layout(
        self, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype = torch.float16, ordered: bool = False
    ) -> Layout:
        assert isinstance(grid, Affine)
        groups = grid.param_shapes(shape)["scale"][1][1]
        return {
            ".qweight": (torch.int32, (shape[1] * grid.bits // 32, shape[0])),
            ".qzeros": (torch.int32, (groups, shape[0] * grid.bits // 32)),
            ".scales": (torch.float16, (groups, shape[0])),
            ".g_idx": (torch.int32, (shape[1],)),
        }

    def config(self, grids: Mapping[str, Grid], kept: Iterable[str], ordered: bool = False) -> dict[str, Any]:
        grid = next((grid for grid in grids.values() if isinstance(grid, Affine)), Affine())
        # How layers of a block are left out. GPTQModel: `-:` and a regular expression. transformers, through optimum:
        # the names of all others, or their ends. Heads are left out anyway.
        left_out = [name for name in sorted(kept) if re.search(r"\bh\.\d", name)]
        partly: dict[str, Any] = {
            "dynamic": {f"-:.*{re.escape(name)}$": {} for name in left_out},
            "modules_in_block_to_quantize": [list(grids)],
        }
        return {
            "quant_method": "gptq",
            "checkpoint_format": self._written(grid),
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": ordered,
            "lm_head": False,
            "pack_dtype": "int32",
            **(partly if left_out else {}),
        }

    def _with_groups(self, tensors: Mapping[str, Tensor], grid: Affine) -> Mapping[str, Tensor]:
        """The tensors with `g_idx`, the group of each input, which the first programs left out."""
        if ".g_idx" in tensors or ".qweight" not in tensors:
            return tensors
        if self.said.get("desc_act"):
            raise FormatError("the quantized weight lacks g_idx, and with desc_act: true its order is not known")
        qweight = tensors[".qweight"]
        if qweight.dim() != 2:
            raise FormatError(f"qweight is int32 [I * bits / 32, O], got {qweight.dtype} {list(qweight.shape)}")
        columns = qweight.shape[0] * 32 // grid.bits
        return {**tensors, ".g_idx": torch.arange(columns, dtype=torch.int32) // grid.width(columns)}

    def _written(self, grid: Grid) -> str:
        return self.version or (V1 if isinstance(grid, Affine) and grid.symmetric else V2)

    def _one_more(self, words: Tensor, stored: Tensor, grid: Affine) -> Tensor:
        """The zeros of a v1 checkpoint from what is stored, one less. uint8[G, O].

        GPTQModel takes the one off whole words, where a zero of 0 borrows from its neighbour (with 3 bits, whose fields
        are split between words, off each field, where it wraps); its own checkpoints are read by the inverse.
        """
        if self._made_by("gptqmodel"):
            if grid.bits == 3:
                return (stored + 1) & grid.top
            ones = sum(1 << at for at in range(0, 32, grid.bits))
            return packing.unpack(to_bytes(words + ones), grid.bits, stored.shape[1])
        if bool((stored == grid.top).any()):
            raise FormatError(
                f"qzeros holds {grid.top} in a v1 checkpoint, which programs read as a zero of 0 or {grid.top + 1}"
            )
        return stored + 1

    def _made_by(self, program: str) -> bool:
        """Whether config.json's `meta.quantizer` names the program: "gptqmodel:7.7.0", or a list of such."""
        meta = self.said.get("meta")
        named = meta.get("quantizer") if isinstance(meta, Mapping) else None
        return any(str(name).partition(":")[0] == program for name in (named if isinstance(named, list) else [named]))

    def _stated(self) -> tuple[Affine, str]:
        """The grid and the version that config.json states."""
        key = next((key for key in STATES_VERSION if key in self.said), "checkpoint_format")
        word = self.said.get(key, V1)
        legal = PACKINGS if key == "packing_format" else {V1: V1, V2: V2}
        if not isinstance(word, str) or word not in legal:
            asked = "packing_format" if legal is PACKINGS else "checkpoint_format"
            raise FormatError(f"config.json says {asked} {word!r:.100}; neoquant reads {' and '.join(legal)}")
        version = legal[word]
        stated = [self.said.get(key) for key in ("bits", "group_size", "sym")]
        if None in stated:
            raise FormatError(
                "the quantization_config of a GPTQ checkpoint states bits, group_size and sym (where it is lacking, "
                "the weights may be of AWQ, which names them alike, and which neoquant does not read)"
            )
        try:
            return Affine(*stated), version  # type: ignore[arg-type]
        except RequestError as error:
            raise FormatError(f"quantization_config: {error}") from error


def _version_of(words: Tensor, grid: Affine) -> str | None:
    """The version in which these words, int32[G, O * bits / 32], hold a symmetric grid's zeros; None for neither.

    Raises FormatError for what is no such words.
    """
    if words.dim() != 2 or not words.numel() or words.dtype != torch.int32:
        found = f"{words.dtype} {list(words.shape)}"
        raise FormatError(f"qzeros is {torch.int32} [groups, O * bits / 32], got {found}")
    outputs = words.shape[-1] * 32 // grid.bits
    for version, stored in ((V1, grid.middle - 1), (V2, grid.middle)):
        row = to_words(torch.full((1, outputs), stored, dtype=torch.uint8), grid.bits)
        if bool((words == row).all()):
            return version
    return None


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    qweight, g_idx = tensors[".qweight"], tensors[".g_idx"]
    if qweight.dim() != 2 or g_idx.dim() != 1 or not qweight.numel() or not g_idx.numel():
        found = f"{list(qweight.shape)} and {list(g_idx.shape)}"
        raise FormatError(f"qweight is int32 [I * bits / 32, O] and g_idx int32 [I], got {found}")
    return qweight.shape[1], g_idx.shape[0]
