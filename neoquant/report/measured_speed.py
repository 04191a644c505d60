"""Speed and memory from `neoquant bench --json`, beside the models of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from neoquant.benchmark.run import Run, Speed
from neoquant.errors import RequestError
from neoquant.report.formatting import NONE
from neoquant.sizes import plural, size


@dataclass(frozen=True)
class MeasuredSpeed:
    """Medians by the name that a model has in comparisons; empty where no benchmark is given."""

    programs: Mapping[str, Run] = field(default_factory=dict)
    settings: str = ""  # prompt, new tokens, threads and type

    def decode(self, name: str) -> str:
        """Tokens a second while generating."""
        found = self.programs.get(name)
        return NONE if found is None else f"{found.decode_tokens_per_s:,.1f}"

    def memory(self, name: str) -> str:
        """The peak while generating."""
        found = self.programs.get(name)
        return NONE if found is None else size(found.peak_bytes)


NO_SPEED = MeasuredSpeed()


def measured_speed(results: Mapping[str, Speed]) -> MeasuredSpeed:
    """neoquant's own runs in the benchmarks, file -> result; other programs are left out.

    Raises RequestError where a model is in two files, or where they were measured with other settings.
    """
    programs: dict[str, Run] = {}
    origin: dict[str, str] = {}
    settings = {file: _settings(result) for file, result in results.items()}
    for file, result in results.items():
        first = next(iter(results))
        if settings[file] != settings[first]:
            raise RequestError(f"{file} cannot stand beside {first}: {settings[file]}, not {settings[first]}")
        for program in result.programs:
            if program.tool != "neoquant":
                continue
            suffix = next((kind for kind in ("int8",) if program.label.endswith(f", {kind} activations")), None)
            name = program.source + (f" ({suffix} activations)" if suffix else "")
            if name in programs:
                raise RequestError(f"{name} is in both {origin[name]} and {file}: leave one out")
            programs[name], origin[name] = program.median, file
    return MeasuredSpeed(programs, next(iter(settings.values()), ""))


def _settings(result: Speed) -> str:
    return (
        f"{plural(result.prompt_tokens, 'prompt token')}, {result.new_tokens} new ones, "
        f"{plural(result.threads, 'thread')}, {result.dtype}"
        + (f", {result.batch} sequences together" if result.batch > 1 else "")
        + (f", keys and values in {result.cache}" if result.cache else "")
        + (", CUDA graphs" if result.static_cache else "")
        + (f", on {result.device}" if result.device != "cpu" else "")
    )
