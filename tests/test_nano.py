"""mimo-nano in miniature: text, corpus, joint training, FP8 export, and the engine that reads it back."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from rich.console import Console

from mtp_engine.config import EngineConfig, MoEConfig
from mtp_engine.errors import EngineError
from mtp_engine.kernels.experts import PlainStack
from mtp_engine.kernels.fp8 import BlockLinear
from mtp_engine.models import loader
from mtp_engine.models.checkpoint import Checkpoint
from mtp_engine.models.export import fp8_settings
from mtp_engine.models.layers import Block
from mtp_engine.models.mimo_v2_flash import MTP_NAMES
from mtp_engine.models.moe import MoE
from mtp_engine.models.tensors import main_tensors, mtp_tensors
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training import data
from mtp_engine.training.muon import Muon
from mtp_engine.training.nano import text as nano_text
from mtp_engine.training.nano.command import export, facts_of, fields_for, main, measure, train
from mtp_engine.training.nano.model import MTP_LAYERS, DenseMoE, NanoModel, nano_fields, parse
from mtp_engine.training.nano.prompts import is_held_out, prompts
from mtp_engine.training.nano.run import NanoRun, NanoSettings
from mtp_engine.training.nano.text import Dialogue, NanoCorpus, build_corpus, read_dialogues
from mtp_engine.training.optimiser import Rates

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 24, "v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 24,
    "swa_v_head_dim": 16, "sliding_window": 16, "n_routed_experts": 4, "max_position_embeddings": 512,
    "quantization_config": fp8_settings(16),
}  # fmt: skip
SETTINGS = NanoSettings(
    steps=200, length=96, rows=8, rates=Rates(muon=1e-2, adam=1e-2, warmup=10), log_every=25, checkpoint_s=1e9
)
NAMES = ["Ann", "Ben", "Tom", "Mia", "Sam", "Eva", "Leo", "Ida"]
ANIMALS = ["cat", "dog", "fox", "hen", "bee", "ant", "owl", "pig", "cow", "elk", "bat", "rat"]
PLACES = ["house", "garden", "forest", "field", "river"]


def dialogues() -> Iterator[Dialogue]:
    """A language to be learnt in a minute: prompts by chance, answers that follow from them."""
    for i, name in enumerate(NAMES):
        for j, animal in enumerate(ANIMALS):
            for k, place in enumerate(PLACES):
                other = ANIMALS[(j + 3) % len(ANIMALS)]
                yield (
                    f"Tell me about {name} and the {animal} in the {place}.",
                    f"{name} had a {animal}. The {animal} was in the {place}. One day the {animal} met a {other}. "
                    f"They went to the {PLACES[(k + 1) % 5]} and {NAMES[i - 1]} gave them some bread. They were happy.",
                )


@dataclass(frozen=True)
class Trained:
    out: Path
    work: Path
    run: NanoRun


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> NanoCorpus:
    return build_corpus(dialogues(), tmp_path_factory.mktemp("corpus"), vocab=340)


def miniature(corpus: NanoCorpus, folder: Path, settings: NanoSettings = SETTINGS) -> NanoRun:
    vocab = int(corpus.tokens.max()) + 6  # the marks behind <|im_end|> stand in no text
    raw = nano_fields(vocab, vocab - 6, vocab - 8, **SMALL)
    return NanoRun(NanoModel(raw, CPU, torch.float32), corpus, settings, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that has been through everything that `python -m mtp_engine.training.nano` does."""
    root = tmp_path_factory.mktemp("trained")
    work, out = root / "nano.training", root / "nano"
    corpus = build_corpus(dialogues(), work, vocab=340)
    raw = fields_for(work, **SMALL)
    run = NanoRun(NanoModel(raw, CPU, torch.float32), corpus, SETTINGS, work)
    train(run, Console(stderr=True, quiet=True))
    export(run.model, raw, work, out)
    return Trained(out, work, run)


def test_the_loss_falls_in_both_phases(trained: Trained) -> None:
    log = [json.loads(line) for line in (trained.work / "log.jsonl").read_text().splitlines()]
    first, last = log[0], log[-1]
    assert len(first["loss"]) == 2, "one MTP layer at first"
    assert len(last["loss"]) == 1 + MTP_LAYERS
    assert last["loss"][0] < 0.3 * first["loss"][0]
    assert max(last["loss"]) < 0.5
    assert last["rate"] < 0.01 < first["rate"] == 1.0
    assert max(max(row) for row in last["load"]) < 2 / 4, "no expert takes twice its share"
    assert last["step"] == SETTINGS.steps and last["share"] == 1.0  # noqa: PT018


def test_an_exported_model_drafts_well_and_says_the_same_without(trained: Trained) -> None:
    """The figures of the card, read back from FP8 through the engine's own loader, on prompts that were held out."""
    facts = {"command": "python -m nano", **facts_of(trained.run, "somebody", trained.out)}
    (trained.work / "facts.json").write_text(json.dumps(facts))
    measure(trained.out, trained.work, EngineConfig(max_context=256, threads=1, draft_int8=False), reference="")
    figures = json.loads((trained.work / "figures.json").read_text())
    assert figures["equal"] == figures["prompts"] == len(trained.run.corpus.held_out) == 8
    assert figures["accepted_length"] > 3, "the language is easy: of four tokens most are right"
    assert figures["perplexity"] < 1.3
    card = (trained.out / "README.md").read_text()
    assert all(f"**{prompt}**" in card for prompt, _ in trained.run.corpus.held_out)
    assert card.count(" had a ") >= 8
    assert f"{figures['accepted_length']:.3f}" in card


def test_bad_input_is_named(tmp_path: Path) -> None:
    build_corpus(list(dialogues())[:3], tmp_path / "nano.training", vocab=300)
    options = ["--text", str(tmp_path), "--out", str(tmp_path / "nano"), "--device", "cpu"]
    for more in ([], ["--measure-only"]):
        with pytest.raises(EngineError, match="holds no dialogue"):
            CliRunner().invoke(main, [*options, *more], standalone_mode=False, catch_exceptions=False)
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="no NVIDIA GPU"):
            CliRunner().invoke(main, [*options, "--device", "cuda"], standalone_mode=False, catch_exceptions=False)
    corpus = build_corpus(dialogues(), tmp_path, vocab=300)
    with pytest.raises(EngineError, match="a step takes 8000: write more"):
        miniature(corpus, tmp_path, replace(SETTINGS, rows=8000))


def test_an_export_holds_what_its_config_calls_for(trained: Trained) -> None:
    """Names, shapes and dtypes; FP8 everywhere where the real model has it; the scales of fused sections."""
    config, mtp = parse(json.loads((trained.out / "config.json").read_text()))
    checkpoint = Checkpoint(trained.out)
    expected = [*main_tensors(config), *mtp_tensors(config, mtp, MTP_NAMES)]
    assert sorted(checkpoint) == sorted(tensor.name for tensor in expected)
    for tensor in expected:
        assert (checkpoint.shape(tensor.name), checkpoint.stored_dtype(tensor.name)) == (tensor.shape, tensor.dtype)
    assert checkpoint.shape("model.layers.0.self_attn.k_proj.weight_scale_inv")[0] == 2, "1.5 blocks of keys"
    assert not (trained.work / "export").exists()
    main = loader.load_main(trained.out, torch.float32, CPU, lambda *_: None)
    values = trained.run.model.weights.named()
    for layer in (0, 1):
        names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
        wanted = torch.cat([values[name] for name in names])
        found = cast(BlockLinear, cast(Block, main.blocks[layer]).attention.qkv).weight.part(
            0, len(wanted), torch.float32
        )
        assert (found - wanted).norm() < 0.04 * wanted.norm()


def test_mimo_nano_is_small_enough() -> None:
    """24 MB with tokenizer and card; the headers take 0.1 MB, a tokenizer of 8192 entries 0.6 MB."""
    config, mtp = parse(nano_fields(8192, 8186, 8184))
    size = sum(tensor.nbytes for tensor in (*main_tensors(config), *mtp_tensors(config, mtp, MTP_NAMES)))
    assert size == 22_219_984


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(corpus: NanoCorpus, tmp_path: Path) -> None:
    """In both phases, with the optimisers' memory and the order of the rows."""
    settings = replace(SETTINGS, steps=12, log_every=1, rows=8)
    whole = miniature(corpus, tmp_path / "whole", settings)
    list(whole.run())
    for stop in (4, 10):
        part = miniature(corpus, tmp_path / str(stop), settings)
        entries = part.run()
        while next(entries).step < stop:
            pass
        entries.close()
        again = miniature(corpus, tmp_path / str(stop), settings)
        assert again.resume()
        assert again.step == stop
        list(again.run())
        for name, master in whole.model.weights.named().items():
            assert torch.equal(master, again.model.weights.named()[name]), name


def test_a_run_with_another_setting_is_refused(corpus: NanoCorpus, tmp_path: Path) -> None:
    run = miniature(corpus, tmp_path)
    assert not run.resume()
    run.save()
    other = miniature(corpus, tmp_path, replace(SETTINGS, seed=1))
    with pytest.raises(EngineError, match="another setting of seed"):
        other.resume()


def test_a_loss_that_is_no_number_stops_the_run(corpus: NanoCorpus, tmp_path: Path) -> None:
    run = miniature(corpus, tmp_path, replace(SETTINGS, steps=4, log_every=1))
    run.save()
    kept = (tmp_path / "state.safetensors").read_bytes()
    run.model.weights.named()["model.norm.weight"].fill_(math.nan)
    run.model.weights.refresh()
    with pytest.raises(EngineError, match="not a number at step 1"):
        list(run.run())
    assert (tmp_path / "state.safetensors").read_bytes() == kept


def test_weights_that_are_no_numbers_are_never_kept(corpus: NanoCorpus, tmp_path: Path) -> None:
    """The last update spoilt them: neither an interruption nor the end writes a checkpoint."""
    for steps, stop in ((4, True), (1, False)):
        run = miniature(corpus, tmp_path / str(steps), replace(SETTINGS, steps=steps, log_every=1))
        entries = run.run()
        next(entries)
        run.model.weights.named()["model.norm.weight"].fill_(math.nan)
        run.model.weights.refresh()
        if stop:
            entries.close()
        else:
            with pytest.raises(EngineError, match="not a number"):
                next(entries)
        assert not (run.folder / "state.safetensors").exists()


def test_time_decides_where_minutes_are_given(corpus: NanoCorpus, tmp_path: Path) -> None:
    """The last phase comes and the rate falls, however many steps there is time for."""
    run = miniature(corpus, tmp_path, replace(SETTINGS, minutes=0.04, rows=4, log_every=1))
    first, *_, last = run.run()
    assert len(last.loss) == 1 + MTP_LAYERS
    assert last.share == 1.0
    assert last.rate < first.rate == 1.0


def test_the_dense_mixture_equals_the_engines() -> None:
    """Values, and gradients by input, router and experts."""
    config = MoEConfig(experts=6, per_token=2)
    torch.manual_seed(0)
    shapes = {"router": (6, 16), "gate_up": (6, 48, 16), "down": (6, 16, 24), "x": (2, 7, 16)}
    leaves = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    moe = MoE(config, leaves["router"], torch.randn(6), PlainStack(leaves["gate_up"]), PlainStack(leaves["down"]))
    load = torch.zeros(6)
    found, wanted = (make(leaves["x"]) for make in (DenseMoE(moe, load), moe))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert load.sum() == 2 * 14
    direction = torch.randn_like(found)
    grads = [torch.autograd.grad(y, list(leaves.values()), direction) for y in (found, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_step_leaves_the_gradients_of_its_definition(corpus: NanoCorpus, tmp_path: Path) -> None:
    """L_main + 0.3 * mean of the MTP losses, each a plain cross-entropy over shifted tokens."""
    run = miniature(corpus, tmp_path)
    model, tokens = run.model, corpus.rows(32, 0)[:3].long()
    losses = model.step(tokens, MTP_LAYERS, 0.3)
    found = {p.leaf: p.leaf.grad.clone() for p in model.weights.parameters if p.leaf.grad is not None}
    for leaf in found:
        leaf.grad = None
    total, head = torch.zeros(()), model.main.head_weight
    for ahead, output in enumerate(model._outputs(tokens, MTP_LAYERS), 1):
        loss = F.cross_entropy((output[:, :-ahead] @ head.T).flatten(0, 1), tokens[:, ahead:].flatten())
        torch.testing.assert_close(loss, losses[ahead - 1], rtol=1e-4, atol=1e-5)
        total = total + loss * (1.0 if ahead == 1 else 0.3 / MTP_LAYERS)
    total.backward()
    for leaf, grad in found.items():
        assert leaf.grad is not None
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-3, atol=1e-6)


def test_training_rows_are_what_the_engine_computes(trained: Trained) -> None:
    """The MTP layers' row rule: layer k's row j reads token j + 1 + k and the main model's hidden state j, as in drafting.

    An engine that drafts from the same weights in fp32 accepts exactly where the rows' first choices are the main model's.
    """
    model, tokens = trained.run.model, trained.run.corpus.rows(96, 5)[:4].long()
    outputs = model._outputs(tokens, MTP_LAYERS)
    head = model.main.head_weight
    main = (outputs[0] @ head.T).argmax(-1)
    for ahead, output in enumerate(outputs[1:], 1):
        agree = (output @ head.T).argmax(-1)[:, : -1 - ahead] == main[:, ahead:-1]
        assert agree.float().mean() > 0.8, ahead


def test_experts_that_have_too_much_lose_bias(corpus: NanoCorpus, tmp_path: Path) -> None:
    run = miniature(corpus, tmp_path)
    model = run.model
    model.step(corpus.rows(32, 0)[:2].long(), 1, 0.3)
    loads = model.loads.clone()
    shares = model.balance(0.01)
    torch.testing.assert_close(shares, loads / loads.sum(1, keepdim=True))
    bias = model.weights.named()["model.layers.1.mlp.gate.e_score_correction_bias"]
    torch.testing.assert_close(bias, 0.01 * (loads[0].mean() - loads[0]).sign())
    assert not model.loads.any()


def test_rows_begin_with_dialogues_and_hold_each_once(corpus: NanoCorpus) -> None:
    rows, again = corpus.rows(128, 3), corpus.rows(128, 3)
    assert torch.equal(rows, again)
    begin = int(corpus.tokens[0])
    assert (rows[:, 0] == begin).all()
    assert not torch.equal(rows, corpus.rows(128, 4))
    sizes = corpus.starts.diff()
    found = (rows == begin).sum() // 2  # two turns each
    assert len(sizes) - 2 <= found <= len(sizes)
    one = NanoCorpus(torch.arange(30, dtype=torch.int32), torch.tensor([0, 10, 20, 30]), [])
    flat = one.rows(15, 0).flatten().tolist()
    assert [x // 10 for x in flat[:10]] == [flat[0] // 10] * 10
    assert sorted(flat[:10]) == flat[:10] and flat[10] % 10 == 0  # noqa: PT018


def test_a_corpus_is_encoded_as_the_engine_encodes_chats(tmp_path: Path) -> None:
    corpus = build_corpus(dialogues(), tmp_path, vocab=300)
    tokenizer = Tokenizer.load(tmp_path)
    prompt, answer = next(dialogue for dialogue in dialogues() if not is_held_out(dialogue[0]))
    chat = tokenizer.chat([{"role": "user", "content": prompt}])
    first = corpus.tokens[: int(corpus.starts[1])].tolist()
    assert first[: len(chat)] == chat
    assert first[len(chat) : -2] == tokenizer.encode(answer)
    assert first[-2] in tokenizer.eos_ids
    assert tokenizer.decode(first[-1:], skip_special=False) == "<|endoftext|>"
    assert tokenizer.vocab_size == 300
    kept = NanoCorpus.load(tmp_path)
    assert kept is not None
    assert torch.equal(kept.tokens, corpus.tokens)
    assert torch.equal(kept.starts, corpus.starts)


def test_held_out_prompts_are_not_learnt(corpus: NanoCorpus) -> None:
    everything = list(dialogues())
    assert {prompt for prompt, _ in corpus.held_out} == {prompt for prompt, _ in everything if is_held_out(prompt)}
    assert len(corpus.starts) - 1 + len(corpus.held_out) == len(everything)


def test_written_dialogues_become_prompts_and_tidy_answers(tmp_path: Path) -> None:
    """Whole answers stay; cut, looping and short ones are shortened or left out."""
    build_corpus(dialogues(), tmp_path / "writer", vocab=340)
    tokenizer = Tokenizer.load(tmp_path / "writer")
    sentences = ["Ann had a cat.", "The cat was in the house.", "One day the cat met a hen.", "They were happy."]
    whole, looping = " ".join(sentences), " ".join(sentences[:3] + sentences[:3] * 6)
    [eos] = tokenizer.eos_ids
    cases = [
        ([*tokenizer.encode(whole), eos], whole),
        (tokenizer.encode(whole)[:-2], " ".join(sentences[:3])),
        ([*tokenizer.encode(looping), eos], " ".join(sentences[:3])),
        ([*tokenizer.encode("Yes."), eos], None),
        ([*tokenizer.encode(whole + " Ünsinn."), eos], None),
    ]
    rows, kinds = torch.zeros(len(cases), 400, dtype=torch.int32), torch.zeros(len(cases), 400, dtype=torch.uint8)
    for i, (answer, _) in enumerate(cases):
        chat = tokenizer.chat([{"role": "user", "content": f"What was {NAMES[i]}'s animal?"}])
        rows[i, : len(chat) + len(answer)] = torch.tensor([*chat, *answer])
        kinds[i, : len(chat)], kinds[i, len(chat) : len(chat) + len(answer)] = data.GIVEN, data.ANSWER
    folder = tmp_path / "text"
    sha = data.tokenizer_sha(tokenizer.folder)
    data.begin_corpus(folder, {"row_length": 400, "vocab_size": tokenizer.vocab_size, "tokenizer": sha})
    data.write_shard(folder, 0, rows, data.mark_loops(rows, kinds))
    wanted = [(f"What was {NAMES[i]}'s animal?", text) for i, (_, text) in enumerate(cases) if text]
    assert list(read_dialogues(folder, tokenizer)) == wanted


def test_prompts_differ_and_depend_on_the_seed() -> None:
    some = list(prompts(3000))
    assert len(set(some)) == 3000
    assert some[:100] == list(prompts(100))
    assert some[:100] != list(prompts(100, seed=1))
    assert 20 < sum(map(is_held_out, some)) < 80
    assert not [prompt for prompt in some if "{" in prompt or " a o" in prompt or " an b" in prompt]


def test_muon_equals_torchs() -> None:
    """Up to the rounding of its bf16 iteration."""
    torch.manual_seed(0)
    mine = [torch.randn(shape) for shape in [(24, 16)] * 3 + [(16, 24), (16, 16)]]
    theirs = [each.clone() for each in mine]
    ours = Muon(mine, lr=2e-2, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("The old house was a warm and cosy place to be. It was a warm and cosy place to be. The end is here.",
         "The old house was a warm and cosy place to be."),
        ("A cat sat on the mat in the sun, and a cat sat on the mat in the sun.", ""),
        ("The lion slept in the shade of a tree. A bird sang in the branches of it.",
         "The lion slept in the shade of a tree. A bird sang in the branches of it."),
        ("Yes, a hat is good for many things. No. Yes. No. It is warm, they say.",
         "Yes, a hat is good for many things. No. Yes."),
    ],
    ids=["a sentence that says it again", "within a sentence", "nothing", "short sentences"],
)  # fmt: skip
def test_answers_end_before_they_repeat_themselves(said: str, kept: str) -> None:
    assert nano_text._tidy(said, ended=True) == kept
