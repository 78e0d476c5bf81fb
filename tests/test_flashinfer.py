"""FlashInfer's tree attention: the twin, what is planned on the host, error messages, the commands; on a GPU the kernel."""

import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_engine.cli.kernels import kernels as command
from mtp_engine.kernels import attention_check, flashinfer_build
from mtp_engine.kernels.attention import TreePlan, TreeShape, tree_attention_twin
from mtp_engine.kernels.attention_check import MAX_ERROR, Case, Checked, random_case
from mtp_engine.kernels.flashinfer_build import KernelError, library_name

CPU = torch.device("cpu")
SMALL = TreeShape(0, 3, 4, 2, 8, 6, 4, 0)
GPU_SHAPES = {
    "MiMo global": TreeShape(0, 0, 64, 4, 192, 128, 64, 0),
    "MiMo window": TreeShape(0, 0, 64, 8, 192, 128, 64, 0),
    "SmolLM2": TreeShape(0, 0, 9, 3, 64, 64, 64, 0),
    "MiMo-7B": TreeShape(0, 0, 32, 8, 128, 128, 64, 0),
}


def with_rows(shape: TreeShape, rows: int, *, split: bool = True) -> TreeShape:
    return TreeShape(0, rows, shape.heads, shape.kv_heads, shape.qk_dim, shape.v_dim, shape.page_size, 0, split=split)


def twin(case: Case, **changes: Any) -> Tensor:
    arguments = {**case.arguments, "out": case.out(torch.float32), "kv_tokens": case.kv_tokens, "pages": case.pages}
    return tree_attention_twin(**{**arguments, **changes})


def dense(case: Case) -> Tensor:
    """A loop over rows and heads that looks up every key by itself, in fp64."""
    shape, a = case.shape, case.arguments
    out = torch.zeros(shape.batch * shape.rows, shape.heads, shape.v_dim, dtype=torch.float64)
    for row in range(len(out)):
        table, prefix, mask = case.pages[row // shape.rows], int(a["prefix"][row]), int(a["tree_mask"][row])
        seen = list(range(max(0, int(a["low"][row])), prefix))
        seen += [prefix + node for node in range(64) if mask >> node & 1]
        for head in range(shape.heads):
            where = [
                (table[s // shape.page_size], s % shape.page_size, head * shape.kv_heads // shape.heads) for s in seen
            ]
            scores = [float(a["q"][row, head].double() @ a["k_cache"][at].double()) * a["scale"] for at in where]
            weights = torch.tensor(scores, dtype=torch.float64).exp()
            total = weights.sum() + a["sink"][head].double().exp()
            for weight, at in zip(weights, where, strict=True):
                out[row, head] += weight / total * a["v_cache"][at].double()
    return out


# --- the twin


@settings(max_examples=25, deadline=None)
@given(
    prefixes=st.lists(st.integers(0, 11), min_size=1, max_size=3),
    rows=st.integers(1, 6),
    spare=st.integers(0, 9),
    window=st.none() | st.integers(1, 8),
    sink=st.none() | st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_twin_is_attention_over_what_each_row_sees(
    prefixes: list[int], rows: int, spare: int, window: int | None, sink: float | None, seed: int
) -> None:
    case = random_case(with_rows(SMALL, rows), prefixes, spare=spare, window=window, sink=sink, device=CPU, seed=seed)
    assert torch.allclose(twin(case).double(), dense(case), atol=1e-5)


def test_twin_takes_all_64_bits() -> None:
    case = random_case(with_rows(SMALL, 64), [5], device=CPU)
    assert int(case.arguments["tree_mask"][63]) < 0, "the last node's own bit is the sign"
    assert torch.allclose(twin(case).double(), dense(case), atol=1e-5)


def test_what_is_planned_beyond_the_keys_does_not_matter() -> None:
    case = random_case(SMALL, [7], device=CPU)
    free = len(case.pages[0])
    caches = {
        name: torch.cat([case.arguments[name], torch.randn_like(case.arguments[name])])
        for name in ("k_cache", "v_cache")
    }
    wide = twin(case, **caches, kv_tokens=[18], pages=[[*case.pages[0], free, free + 1]])
    assert torch.allclose(twin(case), wide, atol=1e-6)


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    case = random_case(SMALL, [7], device=CPU)
    nothing = {"tree_mask": torch.zeros(3, dtype=torch.int64), "low": torch.full((3,), 7, dtype=torch.int32)}
    assert (twin(case, **nothing) == 0).all()
    assert (twin(case, **nothing, sink=torch.full((4,), -float("inf"))) == 0).all()


# --- the plan, with a module that follows FlashInfer's signatures


class FakeModule:
    """Plans nothing, and runs the twin on what it is given."""

    def __init__(self) -> None:
        self.info = [8, 0, 0, 16, *[0] * 11]
        self.planned: list[tuple[Any, ...]] = []

    def workspace_size(self, device_buffer: Tensor, *arguments: Any) -> list[int]:
        assert len(arguments) == 17
        return [1 << 50, 64]

    def plan(self, room: Tensor, integers: Tensor, pinned: Tensor, *arguments: Any) -> list[int]:
        assert len(arguments) == 17
        self.planned.append((pinned.data_ptr(), *arguments))
        return list(self.info)

    def paged_run(
        self, workspace: Tensor, integers: Tensor, info: list[int], q: Tensor, k: Tensor, v: Tensor, row_starts: Tensor,
        starts: Tensor, indices: Tensor, last: Tensor, out: Tensor, lse: None, mask_mode: int, layout: int, window: int,
        pdl: bool, tree_mask: Tensor, prefix: Tensor, low: Tensor, sink: Tensor, scale: float,
    ) -> None:  # fmt: skip
        assert (lse, mask_mode, layout, window) == (None, 2, 0, -1)
        assert workspace.numel() >= info[11] + (info[11] // v.shape[-1] * 2)
        spans = list(zip(starts.tolist(), starts.tolist()[1:], strict=False))
        tree_attention_twin(
            q, k, v, tree_mask=tree_mask, prefix=prefix, low=low, sink=sink, scale=scale, out=out,
            kv_tokens=[(b - a - 1) * k.shape[1] + n for (a, b), n in zip(spans, last.tolist(), strict=True)],
            pages=[indices[a:b].tolist() for a, b in spans],
        )  # fmt: skip


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """No GPU: counts how often a buffer was waited for."""
    waits = SimpleNamespace(count=0)

    class Event:
        def synchronize(self) -> None:
            waits.count += 1

        def record(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    return waits


def test_plan_hands_on_tables_and_arguments(host: SimpleNamespace) -> None:
    case = random_case(SMALL, [3, 9, 0], spare=2, device=CPU)
    out = case.out(torch.float32)
    case.plan(FakeModule()).run(**case.arguments, out=out)
    assert torch.equal(out, twin(case))


def test_plan_turns_its_buffers_over(host: SimpleNamespace) -> None:
    module, shape = FakeModule(), TreeShape(1, 3, 4, 2, 8, 6, 4, 5)
    plan = TreePlan(module, shape, CPU, depth=3)
    for tokens in range(1, 6):
        plan.plan([tokens], [[0, 1]])
    buffers = [planned[0] for planned in module.planned]
    assert len(set(buffers)) == 3
    assert buffers[:3] == buffers[3:]
    assert host.count == 6, "each buffer is waited for before it is used again"


def test_plan_refuses_what_it_is_not_for(host: SimpleNamespace) -> None:
    plan = TreePlan(FakeModule(), TreeShape(2, 3, 4, 2, 8, 6, 4, 5), CPU)
    for tokens, pages in (([9, 12], [[0, 1, 2], [3, 4, 5]]), ([4], [[0]]), ([4, 0], [[0], [1]])):
        with pytest.raises(ValueError, match="the plan is for 2 requests and 5 pages"):
            plan.plan(tokens, pages)
    with pytest.raises(ValueError, match="shorter than its tokens need"):
        plan.plan([9, 4], [[0, 1], [3]])
    with pytest.raises(ValueError, match="64 bits"):
        TreePlan(FakeModule(), TreeShape(1, 65, 4, 2, 8, 6, 4, 5), CPU)
    with pytest.raises(ValueError, match="are needed"):
        TreePlan(FakeModule(), TreeShape(1, 3, 4, 2, 8, 6, 4, 5), CPU, workspace=torch.empty(8, dtype=torch.uint8))


def test_a_plan_that_would_not_fit_the_captured_graph_is_an_error(host: SimpleNamespace) -> None:
    module = FakeModule()
    plan = TreePlan(module, TreeShape(1, 3, 4, 2, 8, 6, 4, 5), CPU)
    module.info[0] += 1
    with pytest.raises(KernelError, match="different grid"):
        plan.plan([4], [[0]])


def test_without_a_split_no_block_is_without_work(host: SimpleNamespace) -> None:
    """FlashInfer marks idle blocks only where keys are split (flashinfer#4002)."""
    module = FakeModule()
    TreePlan(module, TreeShape(1, 3, 4, 2, 8, 6, 4, 5, split=False), CPU)
    *_, split_at, never_split, taken, rows = module.planned[-1]
    assert (split_at, never_split, taken, rows) == (5, False, 2 * 132, 3)


# --- getting the module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv(flashinfer_build.FOLDER, raising=False)
    monkeypatch.setattr(flashinfer_build, "version", lambda name: flashinfer_build.FLASHINFER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(KernelError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("gpu")
def test_flashinfer_is_missing_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flashinfer_build, "version", missing)
    assert "pip install 'mtp-engine[cuda]'" in message(lambda: flashinfer_build.load(64, 64))
    monkeypatch.setattr(flashinfer_build, "version", lambda name: "0.5.0")
    told = message(lambda: flashinfer_build.load(64, 64))
    assert "FlashInfer 0.5.0 is installed, 0.6.18.post1 is needed: pip install 'mtp-engine[cuda]'" in told
    monkeypatch.setattr(flashinfer_build, "version", lambda name: flashinfer_build.FLASHINFER)
    monkeypatch.setitem(sys.modules, "flashinfer.jit", None)
    assert "FlashInfer cannot be imported (" in message(lambda: flashinfer_build.load(64, 64))


@pytest.mark.usefixtures("gpu")
def test_gpu_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "Tesla T4 has compute capability 7.5, 8.0 is needed" in message(lambda: flashinfer_build.load(64, 64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in message(lambda: flashinfer_build.load(64, 64))
    assert "no NVIDIA GPU" in message(lambda: list(attention_check.check(64, 64)))


def test_toolkit_is_looked_for_and_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrapper, real = tmp_path / "wrapper", tmp_path / "real"
    for place, header in ((wrapper, False), (real, True)):
        (place / "bin").mkdir(parents=True)
        (place / "bin/nvcc").write_text("")
        if header:
            (place / "include").mkdir()
            (place / "include/cuda_runtime.h").write_text("")
    monkeypatch.setattr(shutil, "which", lambda name: str(wrapper / "bin/nvcc"))
    monkeypatch.setenv("CUDA_HOME", str(real))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert flashinfer_build._cuda_home() == real
    monkeypatch.setattr(Path, "is_file", lambda self: "wrapper/bin" in str(self))
    told = message(flashinfer_build._cuda_home)
    assert "nvcc is missing" in told
    assert "CUDA_HOME" in told
    assert flashinfer_build.FOLDER in told


def test_failed_build_tells_the_compilers_last_words(tmp_path: Path) -> None:
    def fail(**options: Any) -> None:
        raise RuntimeError(
            "Ninja build failed. Ninja output:\n[1/3] nvcc ...\na.cu(3): error: no such\n1 error detected\n"
        )

    folder = tmp_path / "cache"
    spec = SimpleNamespace(sources=[1, 2], build=fail)
    told = message(lambda: flashinfer_build._compile(spec, folder, "compiling", lambda *progress: None))
    assert "a.cu(3): error: no such | 1 error detected" in told
    assert str(folder / "build.log") in told
    assert "[1/3] nvcc" in (folder / "build.log").read_text()


def test_build_reports_the_objects_that_are_done(tmp_path: Path) -> None:
    def work(**options: Any) -> None:
        (tmp_path / "a.o").touch()
        time.sleep(0.7)

    seen: list[tuple[str, int, int | None]] = []
    spec = SimpleNamespace(sources=[1, 2], build=work)
    flashinfer_build._compile(spec, tmp_path, "compiling", lambda *progress: seen.append(progress))
    assert seen[0] == ("compiling", 1, 3)


@pytest.mark.usefixtures("gpu")
def test_prebuilt_modules_need_no_flashinfer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load_module(path: str) -> str:
        if Path(path).read_text() == "broken":
            raise RuntimeError("Failed to load dynamic library\nlibcudart.so.13: cannot open shared object file")
        return path

    monkeypatch.setattr(flashinfer_build, "version", lambda name: "0.0")
    monkeypatch.setitem(sys.modules, "tvm_ffi", SimpleNamespace(load_module=load_module))
    monkeypatch.setenv(flashinfer_build.FOLDER, str(tmp_path))
    file = tmp_path / library_name(192, 128)
    file.write_text("module")
    assert flashinfer_build.load(192, 128) == str(file)
    file.write_text("broken")
    told = message(lambda: flashinfer_build.load(192, 128))
    assert "libcudart.so.13: cannot open shared object file" in told
    assert "mtp-engine kernels build" in told
    assert "FlashInfer 0.0" in message(lambda: flashinfer_build.load(64, 64)), "what is not in the folder is built"
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    assert "apache-tvm-ffi" in message(lambda: flashinfer_build.load(192, 128))


# --- the commands


def test_build_command_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(qk: int, v: int, *, progress: Any) -> Path:
        progress("compiling", 0, 3)
        file = tmp_path / f"{qk}.so"
        file.write_text(f"{qk}x{v}")
        return file

    monkeypatch.setattr(flashinfer_build, "build", build)
    out = tmp_path / "out"
    result = CliRunner().invoke(command, ["build", "-q", "--dims", "64x64", "--dims", "192x128", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(out / library_name(192, 128)), str(out / library_name(64, 64))]
    assert (out / library_name(64, 64)).read_text() == "64x64"
    plain = CliRunner().invoke(command, ["build", "-q", "--dims", "64x64"])
    assert plain.stdout == f"{tmp_path / '64.so'}\n"


def test_check_command(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Checked("1 row", 2e-3, 12.3), Checked("16 rows", float("nan"), 20.0)]
    monkeypatch.setattr(attention_check, "check", lambda qk, v, progress: iter(rows[:1]))
    good = CliRunner().invoke(command, ["check", "-q", "--dims", "64x64"])
    assert good.exit_code == 0
    assert good.stdout.split() == ["64x64", "error", "us", "1", "row", "2.0e-03", "12.3", "ok"]
    monkeypatch.setattr(attention_check, "check", lambda qk, v, progress: iter(rows))
    bad = CliRunner().invoke(command, ["check", "-q", "--dims", "64x64"])
    assert "WRONG" in bad.stdout
    assert "1 results are off by more than 0.005" in str(bad.exception)


def test_commands_name_the_sizes_there_are() -> None:
    result = CliRunner().invoke(command, ["build", "--dims", "96x96"])
    assert result.exit_code == 2
    assert "'96x96' is not one of 192x128, 64x64, 128x128" in result.output


# --- the kernel itself


def module_for(shape: TreeShape) -> Any:
    try:
        return flashinfer_build.load(shape.qk_dim, shape.v_dim)
    except KernelError as error:
        pytest.skip(str(error))


def ran(case: Case) -> Tensor:
    out = case.out()
    case.plan(module_for(case.shape)).run(**case.arguments, out=out)
    return out


@pytest.mark.cuda
@pytest.mark.parametrize("name", GPU_SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 16, 31, 32, 33, 63, 64])
def test_kernel_is_its_twin(name: str, rows: int) -> None:
    shape, device = with_rows(GPU_SHAPES[name], rows), torch.device("cuda")
    for prefixes, spare, sink in (([0], 0, None), ([1000], 0, 0.5), ([777], 3000, None), ([0, 5, 300, 4097], 70, -1.0)):
        case = random_case(shape, prefixes, spare=spare, sink=sink, device=device, seed=rows)
        assert case.error(ran(case)) <= MAX_ERROR, (prefixes, spare, sink)


@pytest.mark.cuda
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_kernel_keeps_a_window(split: bool, rows: int) -> None:
    """Whole tiles, and the first split with its sink, may be out of sight."""
    shape = with_rows(GPU_SHAPES["MiMo window"], rows, split=split)
    for prefixes, window in (([0], 128), ([190, 64, 127], 128), ([700], 128), ([700], 1), ([700], 5)):
        for sink in (None, 0.5):
            case = random_case(shape, prefixes, window=window, sink=sink, device=torch.device("cuda"))
            assert case.error(ran(case)) <= MAX_ERROR, (prefixes, window, sink)


@pytest.mark.cuda
@pytest.mark.parametrize("split", [True, False])
def test_kernel_on_rows_that_see_nothing(split: bool) -> None:
    case = random_case(with_rows(GPU_SHAPES["SmolLM2"], 4, split=split), [700], sink=None, device=torch.device("cuda"))
    case.arguments["tree_mask"][1:3] = 0
    case.arguments["low"][1:3] = 700
    out = ran(case)
    assert (out[1:3] == 0).all()
    assert case.error(out) <= MAX_ERROR


@pytest.mark.cuda
def test_kernel_takes_a_layer_of_a_larger_cache() -> None:
    case = random_case(with_rows(GPU_SHAPES["MiMo-7B"], 8), [900], device=torch.device("cuda"))
    for name in ("k_cache", "v_cache"):
        cache = case.arguments[name]
        wide = torch.randn(*cache.shape[:2], 2, *cache.shape[2:], device="cuda").to(torch.bfloat16)
        wide[:, :, 1] = cache
        case.arguments[name] = wide[:, :, 1]
    assert case.error(ran(case)) <= MAX_ERROR


@pytest.mark.cuda
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_a_captured_call_follows_prefix_and_plan(name: str) -> None:
    """Captured on a prefix of 10; then it grows within what was planned, and beyond, with a new plan."""
    base, device = with_rows(GPU_SHAPES[name], 6), torch.device("cuda")
    largest = random_case(base, [9000, 5000], device=device)
    module, out = module_for(base), largest.out()
    plan, arguments = TreePlan(module, largest.shape, device), largest.arguments
    graph = torch.cuda.CUDAGraph()

    def grow(prefixes: list[int], tokens: list[int]) -> Case:
        arguments["prefix"].copy_(torch.tensor(prefixes, dtype=torch.int32).repeat_interleave(6))
        return Case(
            largest.shape, tokens, [t[: -(-n // 64)] for t, n in zip(largest.pages, tokens, strict=True)], arguments
        )

    case = grow([10, 10], [64, 200])
    plan.plan(case.kv_tokens, case.pages)
    plan.run(**arguments, out=out)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        plan.run(**arguments, out=out)
    for prefixes, tokens in (
        ([10, 10], [64, 200]),
        ([58, 190], [64, 200]),
        ([500, 200], [512, 256]),
        ([8990, 4000], [9000, 5000]),
    ):
        case = grow(prefixes, tokens)
        plan.plan(case.kv_tokens, case.pages)
        out.fill_(float("nan"))
        graph.replay()
        assert case.error(out) <= MAX_ERROR, prefixes


@pytest.mark.cuda
def test_plans_made_in_a_row_do_not_overwrite_each_other() -> None:
    """More plans than buffers, the device kept busy meanwhile: each call must see its own."""
    shape, device = with_rows(GPU_SHAPES["SmolLM2"], 4), torch.device("cuda")
    cases = [random_case(shape, [100 * i + 50], device=device, seed=i) for i in range(12)]
    plan = TreePlan(module_for(shape), cases[-1].shape, device)
    ballast, outs = torch.randn(4096, 4096, device=device), [case.out() for case in cases]
    for case, out in zip(cases, outs, strict=True):
        for _ in range(4):
            ballast = (ballast @ ballast).clamp_(-1, 1)
        plan.plan(case.kv_tokens, case.pages)
        plan.run(**case.arguments, out=out)
    assert max(case.error(out) for case, out in zip(cases, outs, strict=True)) <= MAX_ERROR


@pytest.mark.cuda
def test_kernel_repeats_itself() -> None:
    case = random_case(with_rows(GPU_SHAPES["MiMo global"], 16), [3000], device=torch.device("cuda"))
    assert torch.equal(ran(case), ran(case))
