"""`import neoquant` costs nothing, and what it promises is there, whatever was used before."""

from __future__ import annotations

import pkgutil

import neoquant


def test_the_public_names_are_sorted_and_exist() -> None:
    assert neoquant.__all__ == sorted(neoquant.__all__)
    for name in neoquant.__all__:
        assert getattr(neoquant, name) is not None
    assert set(dir(neoquant)) == set(neoquant.__all__)


def test_no_module_hides_behind_a_public_name() -> None:
    """Importing a submodule sets an attribute of the package: it must not be one that means something else."""
    modules = {module.name for module in pkgutil.iter_modules(neoquant.__path__)}
    assert not modules & set(neoquant.__all__)
    assert "pipeline" not in modules  # transformers users expect a function there
