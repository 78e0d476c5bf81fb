"""The real model's figures, from config.json and the index alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from real_config import REAL
from safetensors.torch import load_file
from tiny import LLAMA, write_mtp

from mtp_engine.cache import HybridKV, Pages
from mtp_engine.cli.main import main
from mtp_engine.errors import EngineError
from mtp_engine.hub.inspect import ModelReport, inspect_model
from mtp_engine.models import loader
from mtp_engine.models.fields import Fields
from mtp_engine.models.make_tiny import TINY, make_tiny
from mtp_engine.models.mimo_v2_flash import MTP_NAMES, parse, parse_mtp
from mtp_engine.models.tensors import main_tensors, mtp_tensors

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and an index as on the hub: 36,000 expert matrices, and not one weight."""
    folder = tmp_path_factory.mktemp("real")
    fields = Fields(REAL)
    mtp = parse_mtp(fields, [f"model.mtp.layers.{k}.x" for k in range(3)])
    assert mtp is not None
    where = {tensor.name: "model_1.safetensors" for tensor in main_tensors(parse(fields))}
    where |= {tensor.name: "model_mtp.safetensors" for tensor in mtp_tensors(parse(fields), mtp, MTP_NAMES)}
    (folder / "config.json").write_text(json.dumps(REAL))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> ModelReport:
    return inspect_model(str(folder))


def test_parameters(report: ModelReport) -> None:
    assert round(report.parameters / 1e9, 1) == 308.8
    assert round(report.plan.active_parameters / 1e9, 1) == 14.8
    assert round(report.plan.mtp_layer_parameters / 1e9, 3) == 0.329
    assert report.mtp_parameters == 3 * report.plan.mtp_layer_parameters
    assert (report.layers, report.window_layers, report.mtp_layers, report.mtp_depth) == (48, 39, 3, 3)
    assert report.dtypes["F32"] == 47 * (256 * 4096 + 256)  # the routers
    assert report.files == {}


def test_key_value_cache(report: ModelReport) -> None:
    assert report.kv_bytes_per_token["bf16"] == report.plan.kv_per_token == 23_040
    assert report.plan.kv_per_sequence / (129 + 3) * 128 == pytest.approx(25.6e6, rel=0.01)
    assert report.plan.mtp_kv_per_sequence / (129 + 3) * 128 == pytest.approx(2e6, rel=0.02)
    assert report.plan.kv_full_context / GIB == pytest.approx(5.65, rel=0.01)


def test_the_cache_itself_comes_to_the_figure(folder: Path) -> None:
    """The engine's own caches at 262,144 tokens, on a device without memory."""
    main_layers = [layer.attention for layer in loader.read_config(folder).layers]
    mtp_layers = [loader.read_mtp_config(folder).layer.attention] * 3
    total = 0
    for layers in (main_layers, mtp_layers):
        cache = HybridKV(
            layers, Pages(slots=1, tokens=262_144, page_size=64, device=torch.device("meta")), max_nodes=4,
            dtype=torch.bfloat16,
        )  # fmt: skip
        total += sum(group.k.nbytes + group.v.nbytes for group in cache.groups)
    assert total / GIB == pytest.approx(5.65, rel=0.01)
    every_layer_global = 48 * 4 * (192 + 128) * 2 * 262_144
    assert every_layer_global / GIB == pytest.approx(30, rel=0.01)


def test_gpus(report: ModelReport) -> None:
    needed = sum(report.plan.bytes_by_dtype.values()) + report.plan.kv_full_context
    assert 312e9 < needed < 320e9
    assert report.plan.gpus == {"80 GB": 5, "141 GB": 3}


def test_command_line_prints_the_plan(folder: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    for figure in ("308,778,780,864", "14,820,985,024", "329,273,408", "23,040 bytes in bf16", "5.65 GiB", "5 of 80 GB",
                   "3 of 141 GB", "F8_E4M3", "26.4 MB main", "none here"):  # fmt: skip
        assert figure in result.stdout, figure
    document = json.loads(CliRunner().invoke(main, ["inspect", str(folder), "--json", "-"]).stdout)
    assert document["plan"]["kv_per_token"] == 23_040


def config_alone(folder: Path, raw: Mapping[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


def test_config_alone_is_enough(report: ModelReport, tmp_path: Path) -> None:
    """Without the index nothing says how many MTP layers there are: the family's usual number is assumed, and said."""
    alone = inspect_model(config_alone(tmp_path, REAL))
    assert (report.mtp_source, alone.mtp_source) == ("weights", "family")
    assert alone.plan == report.plan
    assert (alone.parameters, alone.mtp_parameters, alone.mtp_layers) == (report.parameters, report.mtp_parameters, 3)
    assert alone.files == {}


def test_config_alone_may_count_its_mtp_layers(report: ModelReport, tmp_path: Path) -> None:
    alone = inspect_model(config_alone(tmp_path, {**REAL, "num_nextn_predict_layers": 2}))
    assert (alone.mtp_source, alone.mtp_layers) == ("config", 2)
    assert alone.mtp_parameters == 2 * report.plan.mtp_layer_parameters
    none = inspect_model(config_alone(tmp_path, {**REAL, "num_nextn_predict_layers": 0}))
    assert (none.mtp_source, none.mtp_layers, none.mtp_parameters) == ("config", 0, 0)
    with pytest.raises(EngineError, match="num_nextn_predict_layers is 'two', not a whole number"):
        inspect_model(config_alone(tmp_path, {**REAL, "num_nextn_predict_layers": "two"}))


def test_config_alone_of_other_families(tmp_path: Path) -> None:
    seven = inspect_model(config_alone(tmp_path, {**TINY["mimo"], "num_nextn_predict_layers": None}))
    assert (seven.mtp_source, seven.mtp_layers, seven.mtp_depth) == ("family", 1, 3)
    llama = inspect_model(config_alone(tmp_path, LLAMA))
    assert (llama.mtp_source, llama.mtp_layers, llama.family) == ("family", 0, "llama")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "3 (assumed: published mimo_v2_flash models have 3; neither weights nor an index are here)"),
        (
            {"num_nextn_predict_layers": 1},
            "1 (assumed: num_nextn_predict_layers of config.json; neither weights nor an index are here)",
        ),
    ],
)
def test_command_line_says_what_is_assumed(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = config_alone(tmp_path, {**REAL, **changes})
    result = CliRunner().invoke(main, ["inspect", folder], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for figure in (said, "308,778,780,864", "none here"):
        assert figure in " ".join(result.stdout.split()), result.stdout
    document = json.loads(CliRunner().invoke(main, ["inspect", folder, "--json", "-"]).stdout)
    assert document["mtp_source"] == ("config" if changes else "family")
    assert document["plan"]["kv_per_token"] == 23_040


def test_config_alone_with_mtp_layers_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    folder, mtp = config_alone(tmp_path / "main", LLAMA), write_mtp(tmp_path / "mtp")
    report = inspect_model(folder, mtp=str(mtp))
    assert (report.mtp_source, report.mtp_layers, list(report.mtp_files)) == ("weights", 3, ["mtp.safetensors"])
    assert report.mtp_parameters == sum(tensor.numel() for tensor in load_file(mtp / "mtp.safetensors").values())


def test_pickled_weights_are_no_plan(tmp_path: Path) -> None:
    folder = config_alone(tmp_path, REAL)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(EngineError, match="safetensors"):
        inspect_model(folder)


def test_incomplete_index_is_named(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.7.mlp.experts.200.up_proj.weight_scale_inv"]
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match=r"model\.layers\.7\.mlp\.experts\.200\.up_proj\.weight_scale_inv"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", ["mimo_v2_flash", "mimo"])
def test_plan_equals_the_files(tmp_path: Path, family: str, fp8: bool) -> None:
    """Where there are weights, their headers say what the formula says."""
    if family == "mimo" and fp8:
        pytest.skip("MiMo-7B is not quantised")
    report = inspect_model(str(make_tiny(tmp_path / "m", family=family, fp8=fp8)))  # type: ignore[arg-type]
    assert report.dtypes == report.plan.parameters_by_dtype
    assert report.mtp_dtypes == report.plan.mtp_parameters_by_dtype
    headers = 8 * len(report.files) + sum(1 for _ in report.files)
    assert 0 < sum(report.files.values()) - sum(report.plan.bytes_by_dtype.values()) - headers < 100_000
