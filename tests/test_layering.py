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
    "stats": ("", ""),
    "tree": ("", "torch"),
    "sampler": ("config", "torch"),
    "guide": ("", "torch"),
    "grammar": ("config errors", "torch llguidance"),
    "protocols": ("tree sampler guide", "torch"),
    "kernels": ("kernels errors", "torch triton flashinfer tvm_ffi"),
    "cache": ("cache kernels tree config errors", "torch numpy"),
    "attention": ("cache kernels tree protocols", "torch"),
    "models": ("models kernels config errors protocols", "torch numpy safetensors gguf tokenizers"),
    "drafters.expand": ("tree config protocols", "torch"),
    "drafters.candidates": ("protocols sampler drafters.expand", "torch"),
    "drafters": (
        "tree sampler attention cache config protocols kernels models.mtp models.layers drafters.expand "
        "drafters.candidates drafters.portable",
        "torch",
    ),
    "verifiers.laws": ("protocols sampler tree", "torch"),
    "verifiers": ("tree sampler attention cache config protocols kernels verifiers.laws", "torch"),
    "slots": ("guide kernels sampler tree", "torch"),
    "stops": ("", ""),
    "limits": ("config tree", "torch"),
    "logprobs": ("tree", "torch"),
    "processors": ("config errors protocols tree", "torch"),
    "members": ("config guide limits logprobs processors sampler stats stops", "torch"),
    "runner": ("members protocols slots tree", "torch"),
    "decode_loop": (
        "attention cache config errors guide logprobs members processors protocols runner slots stats stops tree", "torch",
    ),
    "cuda_attention": ("attention cache kernels protocols", "torch"),
    "flashinfer_attention": ("attention cache cuda_attention kernels protocols", "torch"),
    "cuda_graph": ("errors members protocols runner sampler slots", "torch"),
    "backend": (
        "attention config cuda_attention cuda_graph flashinfer_attention drafters errors models.decoder models.fused "
        "models.mtp protocols runner verifiers",
        "torch triton",
    ),
    "tool_calls": ("", ""),
    "tokenizer": ("errors", "tokenizers jinja2"),
    "hub": ("config errors models.gguf", "platformdirs filelock huggingface_hub"),
    "inspect": ("hub config errors models protocols", "torch"),
    "engine": (
        "hub backend cache config decode_loop drafters errors models protocols stats tokenizer attention kernels sampler "
        "grammar logprobs members stops",
        "torch",
    ),
    "conformance": ("conformance config engine errors hub logprobs protocols mtp_engine", "torch transformers pytest"),
    "training.attention": ("models.decoder", "torch"),
    "training.files": ("errors", ""),
    "training.checkpoint": ("errors training.files training.optimiser training.trainable", "torch safetensors"),
    "training.data": ("errors tokenizer training.files", "torch numpy safetensors"),
    "training.prompts": ("errors tokenizer", "numpy tokenizers"),
    "training.lockstep_cache": ("config kernels.tree_attention training.attention", "torch"),
    "training.lockstep": (
        "kernels.accept models.decoder protocols sampler tokenizer training.data training.lockstep_cache training.prompts",
        "torch",
    ),
    "training.dialogues": (
        "errors models.decoder protocols tokenizer training.data training.lockstep training.prompts", "torch numpy",
    ),
    "training.trainable": ("config kernels.experts models.layers models.weights", "torch"),
    "training.muon": ("", "torch"),
    "training.optimiser": ("training.trainable training.muon training.processes", "torch"),
    "training.heads": ("config errors kernels.fp8 models training.files training.trainable", "torch safetensors"),
    "training.processes": ("", "torch"),
    "training.objective": (
        "kernels.distill kernels.distill_reference models.decoder models.layers models.mtp training.attention "
        "training.processes",
        "torch",
    ),
    "training.trainer": (
        "config errors models.decoder models.mtp training.checkpoint training.data training.heads training.objective "
        "training.optimiser training.processes training.trainable",
        "torch",
    ),
    "training.evaluate": ("config drafters engine models.mtp training.data", ""),
    "training.plan": ("config models.build models.tensors", "torch"),
    "training.report": ("training.files training.trainer", ""),
    "training.run": (
        "config engine errors hub models protocols training.attention training.checkpoint training.data training.dialogues "
        "training.evaluate training.heads training.plan training.processes training.prompts training.report training.trainer",
        "torch",
    ),
    "training.nano_prompts": ("errors training.files", "click"),
    "training.nano_dialogues": (
        "config hub models tokenizer training.dialogues training.nano_prompts", "torch click",
    ),
    "training.nano_text": (
        "errors models.export tokenizer training.data training.files training.nano_prompts training.prompts",
        "torch numpy safetensors tokenizers",
    ),
    "training.nano_model": (
        "config kernels.experts models training.attention training.heads training.objective training.trainable", "torch",
    ),
    "training.nano_run": (
        "errors training.checkpoint training.nano_model training.nano_text training.optimiser", "torch",
    ),
    "training.nano_report": (
        "config engine hub models tokenizer training.attention training.evaluate training.files training.nano_text", "torch",
    ),
    "training.nano": (
        "config errors hub models tokenizer training.checkpoint training.files training.nano_model "
        "training.nano_report training.nano_run training.nano_text training.optimiser",
        "torch tokenizers click rich",
    ),
    "cli.train": (
        "cli.options cli.output cli.progress errors training.dialogues training.objective training.optimiser "
        "training.run training.trainer",
        "click rich",
    ),
    "cli": (
        "cli conformance config engine errors hub inspect kernels models.make_tiny protocols stats tool_calls mtp_engine",
        "click rich",
    ),
}  # fmt: skip


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
        if target is not None and not within(target, project):
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
        outside = [name for name in imported(module) if not within(project_module(name) or "-", module)]
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
                "verifiers.laws",
            }
            assert not [name for name in others if within(name, "drafters verifiers engine decode_loop")], module


def test_only_the_engine_and_its_backend_name_concrete_parts() -> None:
    """And the evaluation of layers under training, which drafts with a module that is in no folder yet."""
    for module in SOURCES:
        targets = {project_module(name) or "" for name in imported(module)}
        if module not in ("engine", "backend", "training.evaluate") and not within(module, "drafters verifiers"):
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
    assert project_module("mtp_engine.hub") == "hub"
    assert project_module("mtp_engine.__version__") == "mtp_engine"
    assert project_module("torch.nn") is None
    assert part_of("drafters.expand") == "drafters.expand"
    assert part_of("drafters.mtp") == "drafters"
