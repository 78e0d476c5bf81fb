"""MiMo's three MTP layers: the drafter's logits are those of a full recomputation with transformers' own modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mimo import Run, load, read_all, transformers_config
from tiny import attached, batch_of, new_request, show_prompt
from torch import Tensor, nn

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import MTPConfig
from mtp_engine.drafters.mtp import MTPDrafter
from mtp_engine.errors import EngineError
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.models.mtp import MTPModule
from mtp_engine.tree import VerifyResult


class Reference(nn.Module):
    """One MTP layer as the report writes it, every row at once: [norm(E[x[j+1+k]]); norm(h[j])] at rotary position j,
    then transformers' decoder layer (sliding window, sink, dense FFN), then the layer's own final norm."""

    def __init__(self, folder: Path, k: int, window_keys: int) -> None:
        from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash as theirs

        super().__init__()
        config = transformers_config(folder, window_keys)
        config.num_hidden_layers, config.layer_types, config.mlp_layer_types = 1, ["sliding_attention"], ["dense"]
        self.keys, width, eps = window_keys, config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.final_layernorm = (theirs.MiMoV2FlashRMSNorm(width, eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = theirs.MiMoV2FlashDecoderLayer(config, 0)
        self.rotary = theirs.MiMoV2FlashRotaryEmbedding(config)
        renamed = {
            "self_attn.attention_sink_bias": "self_attn.sinks",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        }
        own = ("enorm.", "hnorm.", "final_layernorm.", "eh_proj.")
        prefix, state = f"model.mtp.layers.{k}.", {}
        for name, tensor in read_all(folder).items():
            if name.startswith(prefix):
                short = name.removeprefix(prefix)
                state[short if short.startswith(own) else f"block.{renamed.get(short, short)}"] = tensor.float()
        self.load_state_dict(state)

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """[R, H] each -> [R, H]."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))[None]
        at = torch.arange(len(hidden))
        seen = (at <= at[:, None]) & (at > at[:, None] - self.keys)
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)[None, None]
        turns = self.rotary(x, at[None], "sliding_attention")
        return self.final_layernorm(self.block(x, attention_mask=bias, position_embeddings=turns))[0]


class Recorder:
    """The MTP module with a note of the logits of every level."""

    def __init__(self, module: MTPModule) -> None:
        self.module, self.seen = module, dict[int, Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def logits(self, level: int, output: Tensor) -> Tensor:
        self.seen[level] = self.module.logits(level, output)
        return self.seen[level]


class Setting:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.main: Decoder = load(folder)
        self.keys = self.main.config.layers[1].attention.window or 0
        self.layers = [Reference(folder, k, self.keys).eval() for k in range(3)]

    def __repr__(self) -> str:
        return "the models"  # hypothesis prints its arguments

    def hidden(self, tokens: list[int]) -> Tensor:
        return Run(self.main, len(tokens))(torch.tensor(tokens))

    def drafter(self, slots: int = 2) -> tuple[MTPDrafter, Recorder]:
        module = loader.load_mtp(self.folder, self.main, 0, lambda *_: None)
        drafter = attached(MTPDrafter(module, TreeShape.parse("chain:3"), slots=slots), slots=slots)
        recorder = Recorder(module)
        drafter.module = recorder  # type: ignore[assignment]
        return drafter, recorder

    @torch.inference_mode()
    def dense(self, level: int, tokens: list[int], hidden: Tensor) -> Tensor:
        """Logits of the token after tokens x[0..n+level]; hidden: h[0..n-1]."""
        rows = self.main.embedding[torch.tensor(tokens[1 + level :])]
        return self.main.head_weight @ self.layers[level](rows, hidden)[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(make_tiny(tmp_path_factory.mktemp("mtp") / "m", seed=2))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_all_three_layers_equal_the_reference(tiny: Setting, data: st.DataObject) -> None:
    """Incrementally, whatever was accepted before: prompts of up to five windows, two requests side by side."""
    drafter, recorder = tiny.drafter()
    texts = data.draw(st.lists(st.lists(st.integers(0, 255), min_size=2, max_size=40), min_size=1, max_size=2))
    requests = [new_request(slot, text) for slot, text in enumerate(texts)]
    for r in requests:
        chunk = data.draw(st.sampled_from([1, 2, 5, 64]))
        show_prompt(drafter, r.slot, r.prompt, tiny.hidden(r.prompt[:-1]), chunk)
    for _ in range(data.draw(st.integers(1, 8))):
        batch = batch_of(requests)
        tree = drafter.draft(batch)
        counts = torch.tensor([data.draw(st.integers(1, 4)) for _ in requests])  # tokens emitted: accepted drafts + 1
        emitted, hiddens = torch.zeros(len(requests), 4, dtype=torch.int64), torch.zeros(len(requests), 4, 64)
        for b, r in enumerate(requests):
            known, drafts = r.prompt + r.output, tree.tokens[b, 1:].tolist()
            hidden = tiny.hidden(known[:-1])
            for level in range(3):
                expected = tiny.dense(level, known + drafts[:level], hidden)
                assert (recorder.seen[level][b, 0] - expected).abs().max() <= 1e-4, (level, len(known))
                assert int(expected.argmax()) == drafts[level]
            new = [*drafts[: int(counts[b]) - 1], data.draw(st.integers(0, 255))]
            hiddens[b, : len(new)] = tiny.hidden(known + new[:-1])[len(known) - 1 :]
            emitted[b, : len(new)] = torch.tensor(new)
            r.output += new
        drafter.observe(batch, VerifyResult(torch.arange(4).repeat(len(requests), 1), emitted, counts), hiddens)


def test_long_prompt_needs_only_its_last_window(tiny: Setting) -> None:
    drafter, recorder = tiny.drafter()
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(4)).tolist()
    hidden = tiny.hidden(prompt[:-1])
    show_prompt(drafter, 0, prompt, hidden, 48)
    assert int(drafter._first[0]) >= 200 - (tiny.keys + 3)
    tree = drafter.draft(batch_of([new_request(0, prompt)]))
    for level in range(3):
        expected = tiny.dense(level, prompt + tree.tokens[0, 1 : 1 + level].tolist(), hidden)
        assert (recorder.seen[level][0, 0] - expected).abs().max() <= 1e-4


def test_layers_are_counted_from_names(tmp_path: Path) -> None:
    for count in (1, 2, 4):
        folder = make_tiny(tmp_path / str(count), mtp_layers=count, num_nextn_predict_layers=7)
        config = loader.read_mtp_config(folder)
        assert config == MTPConfig(count, config.layer, chained=False, reused=False)
        assert (config.hidden, config.concat, config.own_norm) == ("pre_norm", "embedding_first", True)
        assert (config.layer.attention.sink, config.layer.attention.window) == (True, 8)
        assert config.layer.attention.value_scale == 0.707
    none = make_tiny(tmp_path / "none", mtp_layers=0)
    assert not loader.has_mtp(none)
    with pytest.raises(EngineError, match="has no MTP layers"):
        Engine.load(str(none))


SMALL = {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "n_routed_experts": 4}
PROMPTS = [list(range(40, 42)), list(range(60, 75)), list(range(90, 131)), list(range(100, 230))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("lossless") / "m", seed=2, **SMALL)


@pytest.mark.parametrize("tree", ["chain:3", "2x2x1", "tree:6"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lossless_in_a_batch_across_the_window(small: Path, tree: str, temperature: float) -> None:
    """Four prompts of different lengths, 620 tokens each: 77 times around a window of 8 keys."""
    params = [SamplingParams(620, temperature, seed=seed, ignore_eos=True) for seed in range(4)]
    drafted = _answers(small, params, drafter="mtp", tree=TreeShape.parse(tree))
    plain = _answers(small, params, drafter="root")
    assert [a.token_ids for a in drafted] == [a.token_ids for a in plain]
    assert all(a.stats.mean_accepted_length > 1.1 for a in drafted), "no draft was ever accepted: nothing is tested"


_PLAIN: dict[float, Any] = {}  # plain answers are the same for every tree


CHAIN = TreeShape.parse("chain:3")  # so small a model would draft nothing by itself


def _answers(small: Path, params: list[SamplingParams], **options: Any) -> Any:
    temperature = params[0].temperature
    if options["drafter"] == "root" and temperature in _PLAIN:
        return _PLAIN[temperature]
    config = EngineConfig(threads=1, max_batch=4, max_context=1024, **options)
    answers = Engine.load(str(small), config).generate(PROMPTS, params)
    if options["drafter"] == "root":
        _PLAIN[temperature] = answers
    return answers


def test_window_keys_reach_both_models(tiny: Setting) -> None:
    engine = Engine.load(str(tiny.folder), EngineConfig(threads=1, max_context=64, window_keys=5, tree=CHAIN))
    assert engine.model.config.layers[1].attention.window == 5
    assert engine.loop.work.drafter.module.config.layer.attention.window == 5  # type: ignore[attr-defined]


def test_fp8_folder_drafts_losslessly(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m", fp8=True)
    for dequantize in (False, True):
        config = EngineConfig(threads=1, max_context=256, dequantize=dequantize, tree=CHAIN)
        engine = Engine.load(str(folder), config)
        params = SamplingParams(60, ignore_eos=True, seed=1)
        [answer] = engine.generate([list(range(50, 80))], params)
        assert engine.plain(list(range(50, 80)), params).output == answer.token_ids
