"""The model cache: fetched once, checked, never half-done, shared by processes, usable offline."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import types
import zipfile
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_gguf import write_tiny

from mtp_engine.errors import EngineError
from mtp_engine.hub import cache as cache_module
from mtp_engine.hub import hub
from mtp_engine.hub.hub import prepare
from mtp_engine.hub.wheel import Progress, WheelSource
from mtp_engine.models import gguf as gguf_module

WHEEL = "tiny_model-0.1-py3-none-any.whl"
MEMBER = "tiny_model/Tiny.gguf"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_wheel(shelf: Path) -> WheelSource:
    """A real, tiny wheel that holds a GGUF file, as pip accepts it."""
    shelf.mkdir(parents=True)
    write_tiny(shelf / "Tiny.gguf")
    info = "tiny_model-0.1.dist-info"
    with zipfile.ZipFile(shelf / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(shelf / "Tiny.gguf", MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return source_in(shelf)


def source_in(shelf: Path) -> WheelSource:
    wheel, gguf = shelf / WHEEL, shelf / "Tiny.gguf"
    sizes = {"gguf_bytes": gguf.stat().st_size, "model_bytes": 100_000}
    return WheelSource("tiny-model==0.1", wheel.stat().st_size, digest(wheel), MEMBER, digest(gguf), **sizes)


class Shelf:
    """A Fetch that copies the wheel from a folder and keeps a line per call in a file, across processes."""

    def __init__(self, folder: Path, *, seconds: float = 0.0, die: bool = False) -> None:
        self.folder, self.seconds, self.die = folder, seconds, die

    def __call__(self, source: WheelSource, folder: Path, progress: Progress) -> Path:
        with (self.folder / "calls").open("a") as calls:
            calls.write(f"{os.getpid()}\n")
        data = (self.folder / WHEEL).read_bytes()
        (folder / WHEEL).write_bytes(data[: len(data) // 2])
        if self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        (folder / WHEEL).write_bytes(data)
        return folder / WHEEL

    @property
    def calls(self) -> int:
        path = self.folder / "calls"
        return len(path.read_text().splitlines()) if path.exists() else 0


def offline(source: WheelSource, folder: Path, progress: Progress) -> Path:
    raise EngineError("the network was asked")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    write_wheel(tmp_path / "shelf")
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def source(shelf: Shelf) -> WheelSource:
    return source_in(shelf.folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left(root: Path) -> list[str]:
    """Every file in the cache, apart from locks, and every folder of work in progress."""
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return sorted(str(path.relative_to(root)) for path in [*files, *(root / "tmp").glob("*")])


def whole(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "manifest.json",
    }


def fails(*words: str) -> Any:
    """Expect one line of EngineError that holds all `words`."""
    pattern = "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(EngineError, match=rf"\A{pattern}[^\n]*\Z")


# ---- prepare ------------------------------------------------------------------------------------------------------


def test_fetched_once_then_offline(root: Path, source: WheelSource, shelf: Shelf) -> None:
    seen: list[tuple[str, int, int | None]] = []
    folder = prepare(source, root, shelf, lambda *step: seen.append(step))
    assert whole(folder)
    assert prepare(source, root, offline) == folder
    assert shelf.calls == 1
    assert [name for name in left(root) if not name.startswith("models/")] == ["gguf/Tiny.gguf"]
    what, done, total = seen[-1]
    assert (what, done) == ("converting weights", total)
    assert [step[1] for step in seen if step[0] == what] == sorted(step[1] for step in seen if step[0] == what)


def test_a_finished_folder_needs_nothing_else(root: Path, source: WheelSource, shelf: Shelf) -> None:
    folder = prepare(source, root, shelf)
    (root / "gguf" / "Tiny.gguf").unlink()
    assert prepare(source, root, offline) == folder


def test_a_later_format_converts_the_kept_gguf(
    root: Path, source: WheelSource, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = prepare(source, root, shelf)
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    new = prepare(source, root, offline)
    assert new != old
    assert whole(new)


def test_a_damaged_kept_gguf_is_fetched_again(root: Path, source: WheelSource, shelf: Shelf) -> None:
    folder = prepare(source, root, shelf)
    kept = root / "gguf" / "Tiny.gguf"
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    (folder / "manifest.json").unlink()
    prepare(source, root, shelf)
    assert shelf.calls == 2
    assert digest(kept) == source.gguf_sha256


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_cut_file_is_noticed_and_made_again(
    root: Path, source: WheelSource, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def convert_at_noon(gguf: Path, folder: Path, progress: Progress) -> None:
        convert(gguf, folder, progress)
        for file in folder.iterdir():  # a manifest says in which second its files were written
            os.utime(file, (43200, 43200))

    convert = gguf_module.convert
    monkeypatch.setattr(gguf_module, "convert", convert_at_noon)
    folder = prepare(source, root, shelf)
    good = digest(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    prepare(source, root, offline)
    assert digest(folder / name) == good


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_wrong_hash_leaves_nothing(root: Path, source: WheelSource, shelf: Shelf, field: str) -> None:
    right: str = getattr(source, field)
    with fails("sha256", right, "0" * 64):
        prepare(replace(source, **{field: "0" * 64}), root, shelf)
    assert left(root) == []


def test_a_wheel_without_the_file(root: Path, source: WheelSource, shelf: Shelf) -> None:
    with fails(WHEEL, "other/Tiny.gguf"):
        prepare(replace(source, member="other/Tiny.gguf"), root, shelf)
    assert left(root) == []


def test_an_interrupt_leaves_nothing(root: Path, source: WheelSource, shelf: Shelf) -> None:
    def interrupt(what: str, done: int, total: int | None) -> None:
        if what == "converting weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, root, shelf, interrupt)
    assert left(root) == ["gguf/Tiny.gguf"]
    assert whole(prepare(source, root, offline))


def test_a_cache_that_cannot_be_written(tmp_path: Path, source: WheelSource, shelf: Shelf) -> None:
    (tmp_path / "file").write_text("")
    with fails(str(tmp_path / "file" / "cache"), "Not a directory", "MTP_ENGINE_CACHE"):
        prepare(source, tmp_path / "file" / "cache", shelf)


# ---- several processes --------------------------------------------------------------------------------------------


def spawn(target: Any, *arguments: Any) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def exit_of(process: BaseProcess) -> int | None:
    process.join(30)
    return process.exitcode


def die_converting(what: str, done: int, total: int | None) -> None:
    if what == "converting weights":
        os.kill(os.getpid(), signal.SIGKILL)


def prepare_and_check(source: WheelSource, root: Path, shelf: Shelf) -> None:
    """Prepare; leave a line in `conversions` if this process was the one that converted."""

    def note(what: str, done: int, total: int | None) -> None:
        if what == "converting weights" and done == total:
            with (shelf.folder / "conversions").open("a") as file:
                file.write(f"{os.getpid()}\n")

    assert whole(prepare(source, root, shelf, note))


def prepare_on_a_full_disk(source: WheelSource, root: Path, shelf: Shelf, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with fails(str(root), "File too large", "MTP_ENGINE_CACHE"):
        prepare(source, root, shelf)


def test_killed_while_fetching(root: Path, source: WheelSource, shelf: Shelf) -> None:
    assert exit_of(spawn(prepare, source, root, Shelf(shelf.folder, die=True))) == -signal.SIGKILL
    assert any(name.endswith(WHEEL) for name in left(root)), "the test wants a half-fetched wheel"
    assert whole(prepare(source, root, shelf))
    assert not any(name.startswith("tmp/") for name in left(root))


def test_killed_while_converting(root: Path, source: WheelSource, shelf: Shelf) -> None:
    assert exit_of(spawn(prepare, source, root, shelf, die_converting)) == -signal.SIGKILL
    assert any(name.endswith("model.safetensors") for name in left(root)), "the test wants a half-written model"
    assert list((root / "models").iterdir()) == []
    assert whole(prepare(source, root, offline))
    assert not any(name.startswith("tmp/") for name in left(root))


def test_two_processes_fetch_and_convert_once(root: Path, source: WheelSource, shelf: Shelf) -> None:
    slow = Shelf(shelf.folder, seconds=1.5)
    processes = [spawn(prepare_and_check, source, root, slow) for _ in range(2)]
    assert [exit_of(process) for process in processes] == [0, 0]
    assert shelf.calls == 1
    assert len((shelf.folder / "conversions").read_text().splitlines()) == 1


def test_a_full_disk(root: Path, source: WheelSource, shelf: Shelf) -> None:
    """A limit on the size of files stands in for a full disk: the same OSError from the same writes."""
    limit = (shelf.folder / "Tiny.gguf").stat().st_size - 1000
    assert limit > source.wheel_bytes, "the test wants to fail while unpacking"
    assert exit_of(spawn(prepare_on_a_full_disk, source, root, shelf, limit)) == 0
    assert left(root) == []


# ---- pip ----------------------------------------------------------------------------------------------------------


def test_pip_gets_the_wheel(root: Path, source: WheelSource, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf.folder))
    seen: list[tuple[str, int, int | None]] = []
    assert whole(prepare(source, root, hub.pip_download, lambda *step: seen.append(step)))
    downloads = [step for step in seen if step[0] == "downloading tiny-model==0.1"]
    assert downloads
    assert all(0 <= done <= source.wheel_bytes == total for _, done, total in downloads)


def test_pips_reason_is_given(root: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with fails("No matching distribution found for tiny-model==0.1", "MTP_ENGINE_WHEEL"):
        prepare(source, root, hub.pip_download)
    assert left(root) == []


# ---- locate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTP_ENGINE_CACHE", str(root))
    monkeypatch.delenv("MTP_ENGINE_WHEEL", raising=False)
    return root


def test_a_copy_of_the_wheel_is_checked_too(
    cache: Path, shelf: Shelf, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_ENGINE_WHEEL", str(shelf.folder / WHEEL))
    with fails(WHEEL, "sha256"):
        hub.locate(hub.DEFAULT_MODEL)
    monkeypatch.setitem(hub._WHEELS, hub.DEFAULT_MODEL, source)
    files = hub.locate(hub.DEFAULT_MODEL)
    assert whole(files.folder)
    assert (shelf.folder / WHEEL).is_file()
    assert files.mtp_folder is not None
    assert (files.mtp_folder / "mtp.safetensors").is_file()
    monkeypatch.setenv("MTP_ENGINE_WHEEL", "/nowhere/x.whl")
    assert hub.locate(hub.DEFAULT_MODEL) == files, "a finished cache asks for nothing"


def test_a_missing_copy_of_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_ENGINE_WHEEL", "/nowhere/x.whl")
    with fails("/nowhere/x.whl", "MTP_ENGINE_WHEEL"):
        hub.locate(hub.DEFAULT_MODEL)


def test_a_gguf_file_is_converted_by_its_content(cache: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "sub" / "one.gguf"
    write_tiny(one)
    files = hub.locate(str(one))
    assert (files.name, files.mtp_folder) == ("one", None)
    assert whole(files.folder)
    assert one.is_file()
    two.parent.mkdir()
    one.rename(two)
    assert hub.locate(str(two)) == files
    write_tiny(two, pre="gpt-2")
    assert hub.locate(str(two)).folder != files.folder


def test_a_damaged_gguf_file_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF or not")
    with fails("bad.gguf", "not a whole GGUF file"):
        hub.locate(str(tmp_path / "bad.gguf"))
    assert left(cache) == []


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_local_folder(local: Path) -> None:
    assert hub.locate(str(local)) == hub.ModelFiles("my-model", local, None)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model(local: Path, missing: str) -> None:
    (local / missing).unlink()
    with fails(str(local), "config.json", "safetensors"):
        hub.locate(str(local))


def test_mtp_layers_from_elsewhere(local: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    heads.mkdir()
    (heads / "config.json").write_text("{}")
    with fails(str(heads), ".safetensors"):
        hub.locate(str(local), mtp=str(heads))
    (heads / "mtp.safetensors").write_bytes(b"")
    assert hub.locate(str(local), mtp=str(heads)).mtp_folder == heads


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "nowhere/model.gguf", "a/b/c", "", "../nowhere"])
def test_unknown_names_list_the_known_ones(cache: Path, name: str) -> None:
    with fails(hub.DEFAULT_MODEL, "no such model"):
        hub.locate(name)
    with fails(hub.DEFAULT_MODEL):
        hub.is_cached(name)


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with fails("org/name", r"pip install 'mtp-engine\[hub\]'"):
        hub.locate("org/name")


def test_the_hub_is_asked_for_safe_files_only(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model.safetensors", "pytorch_model.bin", "x.pt", "run.py", "x.pkl", "original/params.json"]
    there += ["chat_template.jinja", "merges.txt", "model.gguf", "onnx/model.safetensors"]
    taken: list[str] = []

    def snapshot_download(
        repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], force_download: bool
    ) -> str:
        assert (repo, force_download) == ("org/name", False)
        found = filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        taken.extend(found)
        return str(local)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.locate("org/name") == hub.ModelFiles("org/name", local, None)
    assert taken == ["config.json", "model.safetensors", "chat_template.jinja", "merges.txt"]


def test_a_failing_hub_gives_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **patterns: Any) -> str:
        raise RuntimeError("404 Client Error\nmore\nlines")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with fails("org/name", "404 Client Error", "HF_TOKEN"):
        hub.locate("org/name")


def test_registry_and_what_is_cached(
    cache: Path, shelf: Shelf, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, nano = hub.registry()
    assert hub.is_cached(nano.name)
    assert hub.locate(nano.name).folder.is_dir()
    assert (model.name, model.licence, model.download_bytes) == ("smollm2-135m-mtp3", "Apache-2.0", 92_871_040)
    assert not hub.is_cached(model.name)
    monkeypatch.setitem(hub._WHEELS, model.name, source)
    folder = prepare(source, cache, shelf)
    assert hub.is_cached(model.name)
    (folder / "manifest.json").unlink()
    assert hub.is_cached(model.name), "the kept GGUF is enough"
    (cache / "gguf" / "Tiny.gguf").unlink()
    assert not hub.is_cached(model.name)


@pytest.mark.model
def test_the_default_model_starts_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.locate(hub.DEFAULT_MODEL)
    monkeypatch.setattr(hub, "pip_download", offline)
    start = time.perf_counter()
    assert hub.locate(hub.DEFAULT_MODEL) == first
    assert time.perf_counter() - start < 0.1
    config = json.loads((first.folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["rope_theta"], config["rms_norm_eps"]) == (30, 100000.0, 1e-5)


# ---- damage and full disks ----------------------------------------------------------------------------------------


def overwrite(path: Path, at: int, data: bytes, *, secretly: bool) -> None:
    """Damage that keeps the size. secretly: the time of writing is as before, too, as when a disk loses bits."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    when = before.st_mtime if secretly else before.st_mtime + 60
    os.utime(path, (when, when))


@pytest.mark.parametrize("secretly", [True, False])
def test_an_overwritten_header_is_noticed_and_mended(
    root: Path, source: WheelSource, shelf: Shelf, *, secretly: bool
) -> None:
    folder = prepare(source, root, shelf)
    good = digest(folder / "model.safetensors")
    overwrite(folder / "model.safetensors", 3, b"\xff", secretly=secretly)
    assert digest(prepare(source, root, offline) / "model.safetensors") == good


def test_damage_behind_the_first_mebibyte(
    root: Path, source: WheelSource, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start sees it by the time of writing; where that is unchanged, whoever fails to load looks at every byte."""
    monkeypatch.setattr(cache_module, "_HEAD", 1000)
    monkeypatch.setenv("MTP_ENGINE_CACHE", str(root))
    folder = prepare(source, root, shelf)
    weights = folder / "model.safetensors"
    good = digest(weights)
    overwrite(weights, 2000, b"\xff" * 64, secretly=False)
    assert digest(prepare(source, root, offline) / "model.safetensors") == good
    overwrite(weights, 2000, b"\xff" * 64, secretly=True)
    assert prepare(source, root, offline) == folder
    assert digest(weights) != good
    assert hub.discard_damaged(folder)
    assert digest(prepare(source, root, offline) / "model.safetensors") == good
    assert not hub.discard_damaged(folder)


def test_a_copied_cache_is_read_once(root: Path, source: WheelSource, shelf: Shelf) -> None:
    """Other times of writing over the right bytes are no damage, and are put right."""
    folder = prepare(source, root, shelf)
    weights = folder / "model.safetensors"
    when = weights.stat().st_mtime
    os.utime(weights, (when + 99, when + 99))
    assert cache_module.damaged_files(folder) == []
    assert int(weights.stat().st_mtime) == int(when)


def test_a_manifest_that_hides_a_file_is_damaged(root: Path, source: WheelSource, shelf: Shelf) -> None:
    folder = prepare(source, root, shelf)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["config.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text("{}")
    assert json.loads((prepare(source, root, offline) / "config.json").read_text())


@pytest.mark.parametrize(("at", "size", "dtype"), [(9000, 50_000, "fp32"), (9000, 50_000, "int8"), (0, 9, "int8")])
def test_an_engine_mends_what_it_cannot_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, size: int, dtype: str
) -> None:
    """0xff all over the embeddings loads in fp32 without complaint; there the first step fails. In int8 it does not load,
    nor does a lost header anywhere."""
    from tiny import write_mtp  # here, since it imports torch, and so would every process that is spawned

    from mtp_engine.cli.main import main

    compiled, cache = hub.cache_root() / "kernels", tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(compiled)
    monkeypatch.setenv("MTP_ENGINE_CACHE", str(cache))
    monkeypatch.setattr(cache_module, "_HEAD", 1000)
    name, heads = str(tmp_path / "tiny.gguf"), {"heads": 4, "kv_heads": 2, "qk_dim": 16, "v_dim": 16, "rope_dim": 16}
    write_tiny(Path(name))
    mtp = write_mtp(
        tmp_path / "mtp", width=64, intermediate_size=64, attention={**heads, "rope_theta": 1e4, "window": None}
    )
    weights = hub.locate(name).folder / "model.safetensors"
    good = digest(weights)
    overwrite(weights, at, b"\xff" * size, secretly=True)
    options = ["--raw", "Once upon", "--model", name, "--mtp", str(mtp), "--tree", "tree:7", "--max-tokens", "2"]
    options += ["--threads", "1", "--dtype", dtype, "--compare", "off"]
    done = CliRunner().invoke(main, ["generate", *options])
    assert done.exit_code == 0, done.output
    assert ("made again" in done.stderr) == (dtype == "fp32")
    assert digest(weights) == good


def test_verify_and_remove(cache: Path, source: WheelSource, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub._WHEELS, hub.DEFAULT_MODEL, source)
    folder = prepare(source, cache, shelf)
    kept = cache / "gguf" / "Tiny.gguf"
    assert [(each.path, each.damaged) for each in hub.verify(hub.DEFAULT_MODEL)[1:]] == [(kept, ()), (folder, ())]
    overwrite(folder / "model.safetensors", 5000, b"?", secretly=True)
    overwrite(kept, 5000, b"?", secretly=True)
    damaged = [each.damaged for each in hub.verify(hub.DEFAULT_MODEL)]
    assert damaged == [(), ("Tiny.gguf",), ("model.safetensors",)]
    for file in ("kernels/step.so", "graphs/0123/main.onnx", "models/other/config.json"):
        (cache / file).parent.mkdir(parents=True)
        (cache / file).write_bytes(b"?" * 100)
    assert hub.remove(hub.DEFAULT_MODEL) > source.gguf_bytes
    assert not (cache / "graphs").exists(), "of an earlier version"
    assert (cache / "kernels" / "step.so").exists(), "another model's, too"
    shutil.rmtree(cache / "models" / "other")
    prepare(source, cache, shelf)
    assert hub.remove(hub.DEFAULT_MODEL) > source.gguf_bytes
    assert left(cache) == []
    assert hub.remove(hub.DEFAULT_MODEL) == 0
    for name in (hub.NANO, str(shelf.folder), "org/name", "no-such"):
        with pytest.raises(EngineError, match=r"nothing to remove|folder of yours|hf cache|no such model"):
            hub.remove(name)


def test_fetch_by_force_makes_everything_anew(root: Path, source: WheelSource, shelf: Shelf) -> None:
    folder = prepare(source, root, shelf)
    inode = (folder / "config.json").stat().st_ino
    prepare(source, root, offline)
    assert (folder / "config.json").stat().st_ino == inode
    prepare(source, root, offline, force=True)
    assert (folder / "config.json").stat().st_ino != inode
    overwrite(root / "gguf" / "Tiny.gguf", 100, b"?", secretly=True)
    prepare(source, root, shelf, force=True)
    assert (shelf.calls, digest(root / "gguf" / "Tiny.gguf")) == (2, source.gguf_sha256)


def test_what_ships_has_its_hashes() -> None:
    """After a change in mtp_engine/assets: write their sha256sum into sha256.json."""
    for name in (hub.NANO, hub.DEFAULT_MODEL):
        checked = hub._verify_assets(name)
        assert checked.damaged == ()
        listed = json.loads((hub._ASSETS / hub._SUMS).read_text())
        there = {path.name for path in checked.path.iterdir() if path.suffix != ".md"}
        assert {Path(file).name for file in listed if file.startswith(f"{name}/")} == there


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=size))


def test_room_for_the_download_is_asked_for_first(
    root: Path, source: WheelSource, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 5_000_000)
    with fails("tiny-model==0.1", r"needs 200 MB", str(root), "5 MB left", "MTP_ENGINE_CACHE"):
        prepare(replace(source, model_bytes=200_000_000 - source.gguf_bytes), root, shelf)
    assert (shelf.calls, left(root)) == (0, [])


def test_room_for_the_conversion_is_asked_for_first(
    root: Path, source: WheelSource, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 2_000_000)
    with fails("converting Tiny.gguf", r"needs \d+ MB", str(root), "2 MB left", "MTP_ENGINE_CACHE"):
        prepare(source, root, shelf)
    assert left(root) == ["gguf/Tiny.gguf"]


def test_a_disk_that_fills_up_under_pip_is_no_matter_of_the_network(
    root: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with fails(r"needs \d+ MB", str(root), "MB left", "MTP_ENGINE_CACHE") as error:
        prepare(source, root, hub.pip_download)
    assert "network" not in str(error.value)
    assert left(root) == []


@pytest.mark.model
def test_the_sizes_of_the_default_model() -> None:
    folder = hub.locate(hub.DEFAULT_MODEL).folder
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size <= hub.SMOLLM2.model_bytes * 1.01
    assert hub.SMOLLM2.model_bytes < size * 1.05
