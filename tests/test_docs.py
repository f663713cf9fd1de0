"""Every public name is documented, in the docs and by its own docstring; what stands there runs."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import selfreg

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def documented() -> set[str]:
    return {
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("name", [name for name in selfreg.__all__ if name != "__version__"])
def test_public_names_are_in_the_reference(name: str) -> None:
    found = getattr(selfreg, name)
    assert f"{selfreg._LOCATIONS[name]}.{name}" in documented()
    assert found.__doc__, name
    members = inspect.getmembers(found, lambda member: inspect.isfunction(member) or inspect.ismethod(member))
    for member, function in members if inspect.isclass(found) else []:
        is_own = function.__module__.startswith("selfreg") and not member.startswith("_")
        # What a base class of transformers documents is known there.
        bases = found.__mro__[1:]
        inherits = any(getattr(getattr(base, member, None), "__doc__", None) for base in bases)
        assert not is_own or function.__doc__ or inherits, f"{name}.{member}"


def test_the_reference_names_what_is_there() -> None:
    for path in documented():
        module, _, name = path.rpartition(".")
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), name), path


def test_pages_are_in_the_navigation() -> None:
    config = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())

    def pages(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        values = nav.values() if isinstance(nav, dict) else nav
        return [page for value in values for page in pages(value)]  # type: ignore[attr-defined]

    assert sorted(pages(config["nav"])) == [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_pages_can_be_read(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf8"), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selfreg"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_commands_on_the_pages_are_there() -> None:
    from typer.main import get_command

    from selfreg.cli import app

    for page in PAGES:
        for line in re.findall(r"^selfreg ([^#\n]+)", page.read_text(encoding="utf8"), re.MULTILINE):
            words = line.split()
            command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                command = command.commands[words[1]]
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, line


def test_examples_in_docstrings_run() -> None:
    tried = 0
    for found in pkgutil.walk_packages(selfreg.__path__, "selfreg."):
        if found.name.endswith("__main__"):
            continue
        source = importlib.util.find_spec(found.name)
        if source is None or source.origin is None or ">>>" not in Path(source.origin).read_text(encoding="utf8"):
            continue
        result = doctest.testmod(importlib.import_module(found.name))
        assert result.failed == 0, found.name
        tried += result.attempted
    assert tried > 0
