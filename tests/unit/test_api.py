"""The public names, as a stranger meets them: each says what it is, so that a reference can be made of them."""

from __future__ import annotations

import inspect

import pytest

import neoquant


@pytest.mark.parametrize("name", [name for name in neoquant.__all__ if name != "__version__"])
def test_is_described(name: str) -> None:
    public = getattr(neoquant, name)
    assert vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    if inspect.isclass(public) and public.__module__.startswith("neoquant"):
        own = {key: value for key, value in vars(public).items() if not key.startswith("_")}
        methods = {key for key, value in own.items() if inspect.isroutine(value) or isinstance(value, property)}
        assert not [key for key in methods if not inspect.getdoc(getattr(public, key))]


def test_names_are_what_they_say() -> None:
    """Names are imported when they are first used, so one could be listed and not be there."""
    assert sorted(dir(neoquant)) == sorted(neoquant.__all__)
    assert {name for name in neoquant.__all__ if not hasattr(neoquant, name)} == set()
