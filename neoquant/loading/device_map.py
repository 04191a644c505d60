"""Which part of a model lies where: one device, or blocks over GPUs, memory and disk.

A block is computed where it lies, and the hidden states go to it; so a quantized block on the CPU uses the kernels for
it, instead of travelling to a GPU for every token. On disk means on the CPU, in the checkpoint's own file mapped into
memory: the system reads and drops it as there is room. That is for plain weights in the type they are stored in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from neoquant.errors import RequestError
from neoquant.model.devices import resolve_device
from neoquant.model.names import in_block
from neoquant.sizes import parse_size

DISK = "disk"
_SPREAD = ("auto", "sequential")
_LAYER = re.compile(r"(?:transformer\.)?\w+(?=\.)")
_FREE = 0.9  # of a GPU's free memory: activations need some as well


@dataclass(frozen=True)
class DeviceMap:
    """Where each unit of a model lies: "disk", or a device. A unit is a block, the embeddings, a norm or a head."""

    units: Mapping[str, torch.device | str]
    tied: bool
    """Whether the language model's head is the embedding."""

    def of(self, name: str) -> torch.device:
        """The device that the tensor `name` is computed with on."""
        place = self.units[unit_of(name, self.tied)]
        return torch.device("cpu") if isinstance(place, str) else place

    def is_mapped(self, name: str) -> bool:
        """Whether the tensor must stay in its file."""
        return self.units[unit_of(name, self.tied)] == DISK

    @property
    def first(self) -> torch.device:
        """Where token ids belong."""
        return self.of(next(iter(self.units)) + ".")

    def describe(self) -> dict[str, int | str]:
        """As transformers' `hf_device_map`."""
        return {
            unit: place if isinstance(place, str) else "cpu" if place.type == "cpu" else place.index or 0
            for unit, place in self.units.items()
        }


def unit_of(name: str, tied: bool) -> str:
    """What is placed as a whole, of which the tensor `name` is part."""
    place = in_block(name)
    if place is not None:
        return name.removesuffix(f".{place[1]}")
    found = _LAYER.match(name)
    layer = found[0] if found else name
    if layer == "lm_head" and tied:
        return "transformer.wte"
    return layer.replace("wpe", "wte")  # both embeddings are added: they lie together


def assign_devices(
    device_map: Any, max_memory: Mapping[int | str, int | str] | None, sizes: Mapping[str, int], tied: bool
) -> DeviceMap:
    """Where each unit of `sizes` (unit -> bytes, in the order of computing) goes.

    `device_map` is a device for all; "auto" fills the GPUs in order, then memory, then disk, up to `max_memory` bytes
    each (device number or "cpu" -> 2000000 or "2GB"); or a mapping of names and their beginnings to devices.

    Raises RequestError for devices that are not there, names that are none of the model's, or parts without a place.
    """
    if isinstance(device_map, Mapping) and set(device_map) != {""}:
        if max_memory is not None:
            raise RequestError("max_memory goes with device_map='auto': an explicit map says itself what lies where")
        return DeviceMap(_explicit(device_map, sizes), tied)
    if isinstance(device_map, Mapping):
        device_map = device_map[""]
    if max_memory is not None and device_map not in _SPREAD:
        raise RequestError(f"max_memory goes with device_map='auto', not with {device_map!r}")
    if device_map in _SPREAD and (max_memory is not None or torch.cuda.is_available()):
        return DeviceMap(_spread(_limits(max_memory), sizes), tied)
    device = DISK if device_map == DISK else resolve_device("auto" if device_map in _SPREAD else device_map)
    return DeviceMap(dict.fromkeys(sizes, device), tied)


def _explicit(device_map: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, torch.device | str]:
    """The longest name in the map that a unit's begins with decides about it."""
    stated = {name.removeprefix("transformer.").removesuffix("."): where for name, where in device_map.items()}
    stated = {"" if name == "transformer" else name: where for name, where in stated.items()}
    used: set[str] = set()
    placed: dict[str, torch.device | str] = {}
    for unit in sizes:
        bare = unit.removeprefix("transformer.")
        names = [name for name in stated if name in ("", bare) or bare.startswith(f"{name}.")]
        if not names:
            raise RequestError(f"device_map says nothing about {unit}; '' stands for all that is not named")
        name = max(names, key=len)
        used.add(name)
        placed[unit] = DISK if stated[name] == DISK else resolve_device(stated[name])
    idle = [name for name in stated if name not in used and name not in ("", "wpe", "lm_head", "h")]
    if idle:
        raise RequestError(f"device_map names {idle[0]!r}, and what is placed as a whole is {', '.join(sizes)}")
    for together in ("wpe", "lm_head"):
        wanted = (
            DISK if stated.get(together) == DISK else resolve_device(stated[together]) if together in stated else None
        )
        alone = any(unit.endswith(together) for unit in sizes)
        if wanted is not None and not alone and wanted != next(iter(placed.values())):
            raise RequestError(f"device_map puts {together} elsewhere than wte, and they must lie together")
    return placed


def _limits(max_memory: Mapping[int | str, int | str] | None) -> list[tuple[torch.device, float]]:
    """The devices to fill, in order, and the bytes that each may take."""
    if max_memory is None:
        free = [torch.cuda.mem_get_info(number)[0] * _FREE for number in range(torch.cuda.device_count())]
        gpus = [(resolve_device(number), size) for number, size in enumerate(free)]
        return [*gpus, (torch.device("cpu"), float("inf"))]
    numbers = sorted(int(key) for key in max_memory if str(key) != "cpu" and str(key).isdecimal())
    for key in max_memory:
        if str(key) != "cpu" and not str(key).isdecimal():
            raise RequestError(f"max_memory names {key!r}; legal are the numbers of GPUs, and 'cpu'")
    limits = {str(key): parse_size(size, f"max_memory of {key}", least=0) for key, size in max_memory.items()}
    gpus = [(resolve_device(number), float(limits[str(number)])) for number in numbers]
    return [*gpus, (torch.device("cpu"), float(limits.get("cpu", float("inf"))))]


def _spread(limits: list[tuple[torch.device, float]], sizes: Mapping[str, int]) -> dict[str, torch.device | str]:
    """Fill one device after another, never going back, so that hidden states move as seldom as can be."""
    remaining = list(limits)
    left = remaining[0][1]
    placed: dict[str, torch.device | str] = {}
    for unit, size in sizes.items():
        while remaining and size > left:
            remaining.pop(0)
            left = remaining[0][1] if remaining else 0
        placed[unit] = remaining[0][0] if remaining else DISK
        left -= size
    return placed
