"""FlashInfer's FA2 attention with a variant of our own: its source, and how the compiled module is had."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

import torch

from mtp_engine.errors import EngineError

Progress = Callable[[str, int, int | None], None]

FOLDER = "MTP_ENGINE_KERNELS"  # names a folder of modules built elsewhere
FLASHINFER = "0.6.18.post1"  # what is used of it is no public interface
HEAD_DIMS = ((192, 128), (64, 64), (128, 128))  # (of queries and keys, of values): MiMo-V2-Flash, SmolLM2, MiMo-7B

TENSORS = {"tree_mask": "int64_t", "prefix": "int32_t", "low": "int32_t", "sink": "float"}
SCALARS = {"sm_scale": "double"}
VARIANT = r"""
struct TreeVisible {
  bool value;
};

// FlashInfer writes `in_chunk && variant.LogitsMask(...)` for every score. An && of our own looks at both sides, so that
// the loads below hang on no condition: they happen once per row and tile, not once per score.
__device__ __forceinline__ bool operator&&(bool in_chunk, TreeVisible visible) { return in_chunk & visible.value; }

struct TreeAttention : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left, first_row;
  float sm_scale_log2;

  template <typename Params>
  __device__ __host__ TreeAttention(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;  // FlashInfer prunes nothing
    first_row = params.q_indptr[batch_idx];
    sm_scale_log2 = params.sm_scale * math::log2e;
  }

  template <typename Params>
  __device__ __forceinline__ TreeVisible LogitsMask(const Params& params, uint32_t, uint32_t qo_idx, uint32_t kv_idx,
                                                    uint32_t, uint32_t) {
    const uint32_t row = first_row + min(qo_idx, qo_len - 1);  // a tile is padded with rows that are not there
    const int32_t kv = kv_idx, prefix = params.prefix[row], low = params.low[row];
    uint64_t node;  // in PTX a shift by more than 63, also by a negative amount, gives 0; in C++ it is undefined
    asm("shr.b64 %0, %1, %2;" : "=l"(node) : "l"(params.tree_mask[row]), "r"(kv - prefix));
    return {bool((kv >= low & kv < prefix) | (node & 1))};
  }

  REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, {
    const float sink = (kv_tile_idx == 0 && qo_head_idx < params.num_qo_heads)
                           ? params.sink[qo_head_idx] * math::log2e : -math::inf;
    const float m_new = sink > m ? sink : m;
    scale = math::ptx_exp2(max(m - m_new, -math::inf));
    d = math::ptx_exp2(max(sink - m_new, -math::inf)) + d * scale;
    m = m_new;
  })

  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return output * scale * (m != -math::inf ? math::ptx_rcp(d) : 0.f);
  })
};
"""


@final
class KernelError(EngineError):
    """A kernel cannot be had on this machine; the line says what to do about it."""


def library_name(qk_dim: int, v_dim: int) -> str:
    """The file of a module in a folder of prebuilt ones."""
    return f"tree_bf16_{qk_dim}_{v_dim}.so"


def load(qk_dim: int, v_dim: int, *, progress: Progress = lambda what, done, total: None) -> Any:
    """The module for bf16 heads of these sizes: prebuilt, from FlashInfer's JIT cache, or compiled now (minutes).

    Raises KernelError.
    """
    folder = os.environ.get(FOLDER)
    file = Path(folder).expanduser() / library_name(qk_dim, v_dim) if folder else None
    if file is None or not file.is_file():
        file = build(qk_dim, v_dim, progress=progress)
    try:
        import tvm_ffi
    except ImportError:
        raise _not_installed("apache-tvm-ffi is not installed") from None
    try:
        return tvm_ffi.load_module(str(file))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise KernelError(
            f"{file}: cannot be loaded: {reason[0]}; build it on this machine: mtp-engine kernels build"
        ) from None


def build(qk_dim: int, v_dim: int, *, progress: Progress = lambda what, done, total: None) -> Path:
    """The module's file in FlashInfer's JIT cache, compiled if it is not there yet. Raises KernelError."""
    _check_flashinfer()
    _check_gpu()
    try:
        from flashinfer.jit import env, gen_customize_batch_prefill_module
    except ImportError as error:
        raise _not_installed(f"FlashInfer cannot be imported ({error})") from None
    digest = sha256(repr((VARIANT, TENSORS, SCALARS)).encode()).hexdigest()[:8]
    name = f"mtp_engine_{Path(library_name(qk_dim, v_dim)).stem}_{digest}"
    file = Path(env.FLASHINFER_JIT_DIR) / name / f"{name}.so"
    if file.is_file():
        return file
    bf16, tools = torch.bfloat16, Path(sys.executable).parent  # ninja comes with FlashInfer
    with _environment(CUDA_HOME=str(_cuda_home()), PATH=f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"):
        spec = gen_customize_batch_prefill_module(
            "fa2", name, bf16, bf16, bf16, torch.int32, qk_dim, v_dim, list(TENSORS), list(TENSORS.values()),
            list(SCALARS), list(SCALARS.values()), "TreeAttention", VARIANT,
        )  # fmt: skip
        _compile(spec, file.parent, f"compiling attention for heads of {qk_dim} and {v_dim}", progress)
    return file


def _compile(spec: Any, folder: Path, what: str, progress: Progress) -> None:
    start, total = time.time() - 1, len(spec.sources) + 1  # file times are coarse; the link comes last
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(spec.build, verbose=False, need_lock=True)
        while not wait_for([job], timeout=0.5).done:
            objects = [file for file in folder.glob("*.o") if file.stat().st_mtime >= start]
            progress(what, len(objects), total)
        try:
            job.result()
        except (RuntimeError, OSError) as error:
            text, log = str(error), folder / "build.log"
            folder.mkdir(parents=True, exist_ok=True)
            log.write_text(text, encoding="utf-8")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            told = [line for line in lines if "error" in line.lower() or "cannot find" in line] or lines
            raise KernelError(f"compiling the attention failed: {' | '.join(told[-2:])[:400]}; see {log}") from None


def _not_installed(what: str) -> KernelError:
    return KernelError(f"{what}: pip install 'mtp-engine[cuda]', or use --attention exact")


def _check_flashinfer() -> None:
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        raise _not_installed("FlashInfer is not installed") from None
    if found != FLASHINFER:
        raise _not_installed(f"FlashInfer {found} is installed, {FLASHINFER} is needed")


def _check_gpu() -> None:
    if os.environ.get("FLASHINFER_CUDA_ARCH_LIST"):
        return  # building for another machine
    if not torch.cuda.is_available():
        raise KernelError(
            "no NVIDIA GPU is in sight: to build for another machine set FLASHINFER_CUDA_ARCH_LIST, as 9.0a"
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        raise KernelError(
            f"{name} has compute capability {major}.{minor}, 8.0 is needed: use --attention torch --dtype fp32"
        )


def _cuda_home() -> Path:
    """The CUDA toolkit. A wrapper script on the PATH is no toolkit: its folder has no headers."""
    on_path = shutil.which("nvcc")
    beside = Path(on_path).resolve().parent.parent if on_path else None
    named = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), beside, "/usr/local/cuda")
    newest = sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for place in [*(Path(place) for place in named if place), *newest]:
        if (place / "bin/nvcc").is_file() and (place / "include/cuda_runtime.h").is_file():
            return place
    raise KernelError(
        "nvcc is missing, and the attention is compiled once: install the CUDA toolkit (or set CUDA_HOME), "
        f"or set {FOLDER} to a folder of modules that `mtp-engine kernels build --out` made elsewhere, or use --attention exact"
    )


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """FlashInfer takes its settings from the environment."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
