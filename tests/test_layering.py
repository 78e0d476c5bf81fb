"""Imports go one way. The table says which modules of the project each part may use; the code is read with ast."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mtp_engine"
FOLDERS = ("drafters", "verifiers", "kernels")

# part -> (parts of the project it may import, other packages besides the standard library)
ALLOWED: dict[str, tuple[str, str]] = {
    "errors": ("", ""),
    "config": ("errors", ""),
    "tree": ("", "torch"),
    "kernels": ("errors", "torch triton flashinfer tvm_ffi"),
    "parallel": ("config errors kernels mtp_engine", "torch"),
    "sampling": ("config errors kernels tree", "torch llguidance"),
    "cache": ("kernels tree config errors", "torch numpy safetensors"),
    "protocols": ("cache sampling.batch tree", "torch"),
    "attention": ("cache kernels protocols tree", "torch"),
    "models": ("kernels config errors parallel protocols", "torch numpy safetensors gguf tokenizers"),
    "drafters": (
        "tree protocols config sampling attention cache kernels models.mtp models.layers models.native parallel.group",
        "torch",
    ),
    "verifiers": ("tree protocols config sampling kernels parallel.group", "torch"),
    "runtime": ("attention.rows cache config errors kernels protocols sampling tree", "torch"),
    "runtime.lead": ("config parallel runtime sampling.stops", ""),
    "runtime.messages": ("config parallel.codec runtime sampling.batch sampling.stops", ""),
    "runtime.scheduler": ("config errors runtime sampling.stops", ""),
    "text": ("errors", "tokenizers jinja2"),
    "hub": ("config errors models protocols", "torch platformdirs filelock huggingface_hub"),
    "assemble": (
        "attention cache config drafters errors hub kernels models parallel protocols runtime sampling text verifiers",
        "torch triton",
    ),
    "team": ("config errors hub models.loader parallel runtime", "torch"),
    "engine": ("assemble cache config drafters errors hub models protocols runtime sampling team text", "torch"),
    "rank": ("engine parallel runtime team", "torch"),
    "async_engine": ("config engine errors protocols runtime", ""),
    "serve": (
        "async_engine attention.rows config engine errors runtime sampling text tree mtp_engine",
        "torch fastapi starlette pydantic uvicorn prometheus_client dynamo uvloop",
    ),
    "conformance": ("config engine errors hub protocols sampling mtp_engine", "torch transformers pytest"),
    "training": (
        "assemble config drafters engine errors hub kernels models parallel protocols runtime sampling team text",
        "torch numpy safetensors tokenizers click rich",
    ),
    "training.nano": ("config engine errors hub kernels models text training", "torch numpy safetensors tokenizers click rich"),
    "experiments": (
        "assemble config drafters engine errors hub models protocols runtime sampling text training.data tree",
        "torch numpy pandas pyarrow matplotlib filelock",
    ),
    "cli": ("conformance config engine errors experiments hub kernels models.make_tiny protocols runtime serve text training "
            "mtp_engine", "click rich prompt_toolkit"),
}  # fmt: skip
"""One line a package; a package may always import itself."""


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name below mtp_engine; each real file once."""
    found = {}
    for folder in (PACKAGE, *(ROOT / name for name in FOLDERS)):
        base = PACKAGE if folder == PACKAGE else ROOT
        for file in folder.rglob("*.py"):
            inside = file.relative_to(base)
            if folder == PACKAGE and inside.parts[0] in FOLDERS:
                continue  # the symlinks, where rglob follows them
            name = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
            found["mtp_engine" if name == "__init__" else name] = file
    return found


SOURCES = sources()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names imported anywhere below `node`, in functions too, but for type checkers."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from imports(ast.Module([other], []))
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


def imported(module: str) -> list[str]:
    return list(imports(ast.parse(SOURCES[module].read_text(encoding="utf-8"))))


def project_module(name: str) -> str | None:
    """mtp_engine.cache.paged.PagedKV -> cache.paged; None for other packages."""
    if name.split(".")[0] != "mtp_engine":
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in SOURCES:
        parts.pop()
    return ".".join(parts) or "mtp_engine"


def within(name: str, parts: str) -> bool:
    """Whether `name` is one of the parts or lies in one."""
    return any(name == part or name.startswith(part + ".") for part in parts.split())


def part_of(module: str) -> str:
    """The row of the table for a module: the most exact one."""
    rows = [part for part in ALLOWED if within(module, part)]
    assert rows, f"{module} has no row in tests/test_layering.py: say there what it may import"
    return max(rows, key=len)


def breaches(module: str) -> list[str]:
    project, packages = ALLOWED[part_of(module)]
    found = []
    for name in imported(module):
        target, package = project_module(name), name.split(".")[0]
        if target is None and package not in sys.stdlib_module_names and package not in packages.split():
            found.append(name)
        if target is not None and not within(target, project) and target.split(".")[0] != module.split(".")[0]:
            found.append(name)
    return found


def test_sources_are_found() -> None:
    """A path gone wrong would make every other test pass."""
    for module in (
        "tree",
        "cache.paged",
        "models.mtp",
        "drafters.mtp",
        "verifiers.match",
        "kernels.reference",
        "cli.main",
    ):
        assert module in SOURCES
    assert all(any(within(module, part) for module in SOURCES) for part in ALLOWED), "a row for nothing"


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "mtp_engine"])
def test_imports_go_one_way(module: str) -> None:
    """Packages' own __init__ gathers what lies in its folder, and nothing else."""
    path = SOURCES[module]
    if path.name == "__init__.py":
        others = [name for name in imported(module) if name.split(".")[0] not in sys.stdlib_module_names]
        outside = [name for name in others if not within(project_module(name) or "-", module)]
        assert not outside, f"{module} imports {outside}"
    else:
        assert not breaches(module), f"{module} must not import {breaches(module)}"


def test_the_package_itself_imports_nothing() -> None:
    assert all(name.split(".")[0] in sys.stdlib_module_names for name in imported("mtp_engine"))


@pytest.mark.parametrize("folder", ["drafters", "verifiers"])
def test_drafters_and_verifiers_do_not_know_each_other(folder: str) -> None:
    for module in SOURCES:
        if within(module, folder) and module != folder:
            others = {project_module(name) or "" for name in imported(module)} - {
                "drafters.expand",
                "drafters.candidates",
                "drafters.portable",
                "drafters.lazy",
                "verifiers.distributions",
            }
            assert not [name for name in others if within(name, "drafters verifiers engine runtime")], module


def test_only_what_assembles_names_concrete_parts() -> None:
    """And the evaluation of layers under training, which drafts with a module that is in no folder yet, and recording,
    whose drafter shows more than drafting asks for."""
    for module in SOURCES:
        targets = {project_module(name) or "" for name in imported(module)}
        named = "engine assemble training.evaluate experiments.record experiments.wide"
        if not within(module, f"{named} drafters verifiers"):
            assert not [name for name in targets if within(name, "drafters verifiers")], module
        if not within(module, "cli"):
            assert not [name for name in targets if within(name, "cli")], module


@pytest.mark.parametrize("folder", ["mtp_engine", *FOLDERS, "tests", "bench"])
def test_no_bare_imports_of_the_linked_folders(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        names = imports(ast.parse(file.read_text(encoding="utf-8")))
        assert not [name for name in names if name.split(".")[0] in FOLDERS], file


@pytest.mark.parametrize("name", FOLDERS)
def test_links_are_relative(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


def test_the_reader_sees_what_it_should() -> None:
    source = """
import torch.nn as nn
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
else:
    import shown
def f():
    from mtp_engine.cache.paged import PagedKV
    with g():
        import kernels
"""
    assert list(imports(ast.parse(source))) == [
        "torch.nn", "typing.TYPE_CHECKING", "shown", "mtp_engine.cache.paged.PagedKV", "kernels",
    ]  # fmt: skip
    assert project_module("mtp_engine.cache.paged.PagedKV") == "cache.paged"
    assert project_module("mtp_engine.text.tokenizer") == "text.tokenizer"
    assert project_module("mtp_engine.__version__") == "mtp_engine"
    assert project_module("torch.nn") is None
    assert part_of("training.nano.text") == "training.nano"
    assert part_of("drafters.mtp") == "drafters"
