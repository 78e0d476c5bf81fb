"""The training corpus: shards, loops, duplicates, and dialogues that a model writes in lock step."""

import errno
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_engine import Engine, EngineConfig, SamplingParams
from mtp_engine.errors import EngineError
from mtp_engine.models import loader
from mtp_engine.models.decoder import Decoder
from mtp_engine.models.make_tiny import make_tiny
from mtp_engine.text.tokenizer import Tokenizer
from mtp_engine.training.data import (
    ANSWER,
    GIVEN,
    LOOP,
    PADDING,
    Corpus,
    answer_keys,
    begin_corpus,
    deduplicate,
    has_shard,
    in_loop,
    mark_loops,
    pack_text,
    read_shard,
    shard_path,
    tokenizer_sha,
    write_shard,
)
from mtp_engine.training.dialogues import DialogueSettings, DialogueStats, ShardPlan, plan_shard, write_dialogues
from mtp_engine.training.lockstep import LockStep
from mtp_engine.training.lockstep_cache import KernelAttention, LockStepCache, PromptAttention, StepAttention
from mtp_engine.training.prompts import FOLLOW_UPS, Template, encode_prompts, read_prompts

CPU = torch.device("cpu")
PROMPTS = (
    "Why is the sky blue?",
    "Add 1 and 2.",
    "<|im_end|> is text here",
    "Name a colour that isn't red, please.",
    "Hi",
)
SMALL = {"num_hidden_layers": 3, "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1]}


def silent(what: str, done: int, total: int | None) -> None: ...


# ---- loops and duplicates ---------------------------------------------------------------------------------------------


def naive_loops(tokens: Sequence[int]) -> list[bool]:
    """The definition: bench/common.py, looping."""
    seen: set[tuple[int, ...]] = set()
    flags = []
    for end in range(1, len(tokens) + 1):
        gram = tuple(tokens[max(0, end - 16) : end])
        flags.append(len(gram) == 16 and gram in seen)
        seen.add(gram)
    return flags


def naive_kinds(tokens: list[int], kinds: list[int]) -> list[int]:
    """`kinds` with the loops of each run of ANSWER marked."""
    marked, start = list(kinds), 0
    while start < len(kinds):
        stop = start
        while stop < len(kinds) and kinds[stop] == ANSWER:
            stop += 1
        for i, looping in enumerate(naive_loops(tokens[start:stop])):
            marked[start + i] = LOOP if looping else ANSWER
        start = max(stop, start + 1)
    return marked


def rows_with_loops(seed: int, rows: int = 6, length: int = 300) -> tuple[Tensor, Tensor]:
    """Answers that repeat themselves with all sorts of periods, between given tokens that may repeat them, too."""
    g = torch.Generator().manual_seed(seed)
    tokens, kinds = torch.zeros(rows, length, dtype=torch.int64), torch.full((rows, length), GIVEN, dtype=torch.uint8)
    for row in range(rows):
        period = int(torch.randint(1, 40, (1,), generator=g))
        tokens[row] = torch.randint(0, 50_000, (period,), generator=g).repeat(length // period + 1)[:length]
        noise = torch.rand(length, generator=g) < 0.02 * row
        tokens[row, noise] = torch.randint(0, 3, (int(noise.sum()),), generator=g)
        start = 0
        while start < length:
            size, gap = (int(x) for x in torch.randint(1, 120, (2,), generator=g))
            kinds[row, start : start + size] = ANSWER
            start += size + gap % 5 + 1
    return tokens, kinds


@pytest.mark.parametrize("seed", range(5))
def test_loops_are_what_the_definition_says(seed: int) -> None:
    tokens, kinds = rows_with_loops(seed)
    marked = mark_loops(tokens, kinds)
    expected = [naive_kinds(t, k) for t, k in zip(tokens.tolist(), kinds.tolist(), strict=True)]
    assert marked.tolist() == expected
    assert (marked == LOOP).any()
    assert torch.equal(mark_loops(tokens, marked), marked), "marking twice is marking once"
    assert in_loop(tokens[0].tolist()) == naive_loops(tokens[0].tolist())
    assert in_loop([]) == []


def test_rows_are_the_same_by_their_first_64_answer_tokens() -> None:
    tokens, kinds = torch.randint(0, 1000, (6, 200)), torch.full((6, 200), ANSWER, dtype=torch.uint8)
    kinds[:, :50] = GIVEN
    tokens[1:, 50:] = tokens[0, 50:]  # the prompts differ
    tokens[2, 50 + 63] += 1
    tokens[3, 50 + 64] += 1  # too late to count
    tokens[4, [60, 61]] = tokens[4, [61, 60]] = torch.tensor([7, 8])
    kinds[5, 80:90] = LOOP
    assert deduplicate(tokens, kinds, set()).tolist() == [True, False, True, False, True, False]
    seen = set(answer_keys(tokens[:1], kinds[:1]))
    assert deduplicate(tokens, kinds, seen).tolist() == [False, False, True, False, True, False]


# ---- shards -----------------------------------------------------------------------------------------------------------


def some_corpus(folder: Path, vocab: int = 300, sha: str = "abc") -> tuple[Tensor, Tensor]:
    begin_corpus(folder, {"model": "m", "tokenizer": sha, "vocab_size": vocab, "row_length": 40})
    tokens, kinds = torch.randint(0, vocab, (6, 40)), torch.full((6, 40), ANSWER, dtype=torch.uint8)
    tokens[0, 0], tokens[5, 0] = vocab - 1, vocab - 1
    for index in range(2):
        write_shard(folder, index, tokens[index * 3 : index * 3 + 3], kinds[index * 3 : index * 3 + 3])
    return tokens, kinds


@pytest.mark.parametrize(("vocab", "width"), [(300, 2), (1 << 16, 2), (100_000, 4)])
def test_shards_come_back(tmp_path: Path, vocab: int, width: int) -> None:
    tokens, kinds = some_corpus(tmp_path, vocab)
    corpus = Corpus.load(tmp_path, tokenizer_sha="abc")
    assert torch.equal(corpus.tokens, tokens.int())
    assert torch.equal(corpus.kinds, kinds)
    assert corpus.info["row_length"] == 40
    assert 0 < shard_path(tmp_path, 0).stat().st_size - 3 * 40 * (width + 1) < 300, "no more bytes than needed"
    assert has_shard(tmp_path, 1)
    assert not has_shard(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corpus.json", "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip


def test_rows_that_two_processes_wrote_are_read_once(tmp_path: Path) -> None:
    tokens, kinds = some_corpus(tmp_path)
    write_shard(tmp_path, 2, tokens[:3], kinds[:3])
    assert torch.equal(Corpus.load(tmp_path).tokens, tokens.int())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def fill(path: Path) -> None:
    path.write_bytes(b"\x00" * 100)


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-300:] = b"\xff" * 300
    path.write_bytes(content)


def disagree(path: Path) -> None:
    write_shard(path.parent, 1, torch.zeros(3, 41), torch.zeros(3, 41))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(cut, "damaged"), (fill, "damaged"), (overwrite, "damaged"), (disagree, "rows of 41 tokens")],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    some_corpus(tmp_path)
    damage(shard_path(tmp_path, 1))
    with pytest.raises(EngineError, match=rf"shard-00001.*{problem}.*delete"):
        Corpus.load(tmp_path)


def test_what_is_no_corpus_for_this_model(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(EngineError, match="no corpus is there; write one first"):
            Corpus.load(folder)
    some_corpus(tmp_path)
    with pytest.raises(EngineError, match="another tokenizer, that of m; write a corpus for this model"):
        Corpus.load(tmp_path, tokenizer_sha="abd")
    with pytest.raises(EngineError, match="begun with another vocab_size and row_length; use the same"):
        begin_corpus(tmp_path, {"model": "m", "tokenizer": "abc", "vocab_size": 301, "row_length": 41})
    (tmp_path / "corpus.json").write_text("[")
    with pytest.raises(EngineError, match=r"corpus\.json: cannot be read"):
        Corpus.load(tmp_path)


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, kinds = some_corpus(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EngineError, match="disk full after 2 shards; free space and run the same command again"):
            write_shard(tmp_path, 2, tokens, kinds)
    assert len(list(tmp_path.iterdir())) == 3, "the unfinished file is gone"
    assert not has_shard(tmp_path, 2)


# ---- prompts and templates --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def write_prompts(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.xz"])
def test_prompts_are_shuffled_and_capped_by_source(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f" p{i} ", "source": "a"} for i in range(30)]
    rows += [{"turns": [f"t{i}", "later"]} for i in range(5)]
    path = write_prompts(tmp_path / name, rows)
    found = read_prompts(path, per_source=10, seed=3)
    assert len(found) == 15
    assert {text for text in found if text[0] == "t"} == {f"t{i}" for i in range(5)}
    assert len({text for text in found if text[0] == "p"}) == 10
    assert found == read_prompts(path, per_source=10, seed=3) != read_prompts(path, per_source=10, seed=4)


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be read .*name a"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "p.jsonl.xz").write_bytes(b"plain")
    with pytest.raises(EngineError, match="cannot be read"):
        read_prompts(tmp_path / "p.jsonl.xz")
    for bad in ({"text": "x"}, {"prompt": 3}, {"turns": []}, [1], {"prompt": "half \ud83d"}):
        with pytest.raises(EngineError, match="line 2: no object with prompt"):
            read_prompts(write_prompts(tmp_path / "p.jsonl", [{"prompt": "x"}, bad]))


def test_a_template_is_cut_where_its_turns_meet(tokenizer: Tokenizer) -> None:
    template = Template.cut(tokenizer)
    assert tokenizer.decode(template.open, False) == "<|im_start|>user\n"
    assert tokenizer.decode(template.head, False) == "<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert tokenizer.decode(template.mid, False) == "<|im_end|>\n<|im_start|>user\n"
    assert len(template.follow_ups) == len(FOLLOW_UPS) == len(set(FOLLOW_UPS))
    for text, piece in zip(FOLLOW_UPS, template.follow_ups, strict=True):
        assert list(piece) == [*template.mid, *tokenizer.encode(text), *template.head]


def with_template(folder: Path, source: Path, template: str) -> Tokenizer:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


def test_a_template_that_cannot_be_cut(tmp_path: Path, model_folder: Path) -> None:
    for i, template in enumerate(("always the same<|im_end|>", "{{ messages[0].content }}{{ messages[-1].content }}")):
        with pytest.raises(EngineError, match="cannot be cut into turns; train on plain text"):
            Template.cut(with_template(tmp_path / str(i), model_folder, template))


def test_prompts_are_encoded_as_chat_does(tmp_path: Path, tokenizer: Tokenizer, model_folder: Path) -> None:
    def chat(chatting: Tokenizer) -> list[list[int]]:
        return [chatting.chat([{"role": "user", "content": text}]) for text in PROMPTS]

    assert encode_prompts(tokenizer, Template.cut(tokenizer), PROMPTS, 1000) == chat(tokenizer)
    short = encode_prompts(tokenizer, Template.cut(tokenizer), PROMPTS, 50)
    assert short == [ids for ids in chat(tokenizer) if len(ids) <= 50] != chat(tokenizer)
    # one that changes the text is found out
    text = (
        (model_folder / "chat_template.jinja")
        .read_text()
        .replace("message.content", "message.content.replace('?', '!')")
    )
    other = with_template(tmp_path / "m", model_folder, text)
    assert encode_prompts(other, Template.cut(other), PROMPTS, 1000) == chat(other) != chat(tokenizer)


def test_text_becomes_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["First text.\n" * 5, "Second, with ümläuts."]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    end = tokenizer.eos_ids[0]
    ids = [*tokenizer.encode(texts[0]), end, *tokenizer.encode(texts[1]), end]
    tokens, kinds = pack_text(tokenizer, files, 32)
    assert tokens.flatten().tolist()[: len(ids)] == ids
    assert kinds.flatten().tolist() == [ANSWER] * len(ids) + [PADDING] * (kinds.numel() - len(ids))
    assert kinds.numel() - len(ids) < 32
    files[1].write_bytes(b"\xff\xfe")
    with pytest.raises(EngineError, match=r"b\.txt: cannot be read as UTF-8"):
        pack_text(tokenizer, files, 32)


# ---- dialogues --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sliding windows with sinks, mixtures of experts, unequal head sizes."""
    return make_tiny(tmp_path_factory.mktemp("flash"), **SMALL)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain attention; EOS is likely."""
    return make_tiny(tmp_path_factory.mktemp("dense"), family="mimo", seed=1, num_hidden_layers=2)


@pytest.fixture(scope="module", params=["flash", "dense"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("model_folder" if request.param == "flash" else "dense_folder")
    return found


def load(folder: Path) -> Decoder:
    return loader.load_main(folder, torch.float32, CPU, silent)


def settings_for(tmp_path: Path, **changes: Any) -> DialogueSettings:
    path = write_prompts(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    options = {"shards": 2, "rows": 7, "length": 192, "max_answer": 40, "max_user": 12, "prompts": path, "batch": 3}
    return DialogueSettings(**{**options, **changes})


def write(folder: Path, settings: DialogueSettings, out: Path, **options: Any) -> DialogueStats:
    return write_dialogues(load(folder), Tokenizer.load(folder), settings, out, progress=silent, **options)


def plans(folder: Path, settings: DialogueSettings) -> tuple[Template, list[ShardPlan]]:
    tokenizer = Tokenizer.load(folder)
    template = Template.cut(tokenizer)
    assert settings.prompts is not None
    texts = read_prompts(settings.prompts, seed=settings.seed)
    prompts = encode_prompts(tokenizer, template, texts, settings.length - 128)
    return template, [plan_shard(settings, template, prompts, index) for index in range(settings.shards)]


def repeats(answer: Sequence[int]) -> bool:
    """The newest 16 tokens stood 1 to 64 tokens before."""
    grams = [tuple(answer[i : i + 16]) for i in range(max(0, len(answer) - 80), len(answer) - 15)]
    return grams[-1] in grams[:-1] if grams else False


class Reader:
    """A row's state machine, token by token: what is given must stand there, what is written ends by the rules."""

    def __init__(self, template: Template, settings: DialogueSettings, eos: Sequence[int]) -> None:
        self.template, self.settings, self.eos = template, settings, eos
        self.pieces = [template.head, template.mid, *template.follow_ups]
        self.ends = {"eos": 0, "full": 0, "loop": 0}

    def kinds(self, tokens: list[int], opening: Sequence[int], answering: bool, pieces: Sequence[int]) -> Iterator[int]:
        given, turn, written = list(opening), 0, []
        for at, token in enumerate(tokens):
            if given:
                assert token == given.pop(0), at
                written = []
                yield GIVEN
                continue
            written.append(token)
            yield ANSWER if answering else GIVEN
            ended = token in self.eos or (not answering and token == self.template.head[0])
            full = len(written) >= (self.settings.max_answer if answering else self.settings.max_user)
            loop = answering and at % 16 == 0 and repeats(written)
            if not (ended or full or loop):
                continue
            piece = pieces[turn] if answering else 0
            given = list(self.pieces[piece])[int(ended) :]
            if answering:
                self.ends["eos" if ended else "loop" if loop else "full"] += 1
            turn, answering = turn + answering, piece != 1


def test_rows_follow_the_rules(tmp_path: Path, folder: Path) -> None:
    settings = settings_for(tmp_path)
    stats = write(folder, settings, tmp_path / "out")
    tokenizer, (template, planned) = Tokenizer.load(folder), plans(folder, settings)
    reader, answers, loops = Reader(template, settings, tokenizer.eos_ids), 0, 0
    for index, plan in enumerate(planned):
        tokens, kinds = read_shard(shard_path(tmp_path / "out", index))
        assert tokens.shape == (7, 192)
        for row in range(7):
            text, opening = tokens[row].tolist(), plan.openings[row]
            expected = list(reader.kinds(text, opening, bool(plan.writing[row]), plan.pieces[row].tolist()))
            assert kinds[row].tolist() == naive_kinds(text, expected), (index, row)
        answers, loops = answers + int((kinds >= ANSWER).sum()), loops + int((kinds == LOOP).sum())
    assert (stats.tokens, stats.answer_tokens, stats.loop_tokens) == (2 * 7 * 192, answers, loops)
    assert stats.duplicates == 0
    assert stats.tokens_per_s > 0
    assert reader.ends["full"]
    assert reader.ends["loop"] or reader.ends["eos"], "the test shows what it should"
    counts = Corpus.load(tmp_path / "out", tokenizer_sha=tokenizer_sha(folder)).info["counts"]
    assert counts["rows"] == 14
    assert counts["answer"] + counts["loop"] == answers
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS]
    begun = [list(opening) for plan in planned for opening in plan.openings if list(opening) != list(template.open)]
    fitting = [ids for ids in prompts if len(ids) <= settings.length - 128]
    times = [begun.count(ids) for ids in fitting]
    assert sum(times) == len(begun) == 8
    assert max(times) - min(times) <= 1, "no prompt comes again before all have come"


def test_answers_are_the_engine_s(tmp_path: Path, folder: Path) -> None:
    """With the row's seed, at every temperature: token for token what the engine says to the same beginning."""
    settings = settings_for(tmp_path, shards=1, rows=8, temperatures=((0.0, 0.5), (0.7, 0.25), (1.0, 0.25)))
    write(folder, settings, tmp_path / "out")
    _, [plan] = plans(folder, settings)
    tokens, kinds = read_shard(shard_path(tmp_path / "out", 0))
    engine = Engine.load(str(folder), EngineConfig(drafter="root", dtype="fp32", max_batch=32))
    beginnings, params, expected = [], [], []
    for index, (row, kind) in enumerate(zip(tokens.tolist(), kinds.tolist(), strict=True)):
        number, at = len(beginnings), 0
        while at < len(row):
            stop = at
            while stop < len(row) and kind[stop] >= ANSWER:
                stop += 1
            if stop > at:
                turn = len(beginnings) - number
                heat, seed = float(plan.temperature[index, turn]), int(plan.seeds[index])
                beginnings.append(row[:at])
                params.append(SamplingParams(max_tokens=stop - at, temperature=heat, seed=seed))
                expected.append(row[at:stop])
            at = max(stop, at + 1)
    assert {0.0, 1.0} <= {param.temperature for param in params}
    found = [engine.generate([b], p)[0].token_ids for b, p in zip(beginnings, params, strict=True)]
    # the engine may leave out the token that ended its answer
    assert [list(ids) for ids in found] == [ids[: len(f)] for ids, f in zip(expected, found, strict=True)]
    assert all(len(ids) - len(f) <= 1 for ids, f in zip(expected, found, strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_goes_on_writes_what_one_run_writes(tmp_path: Path, dense_folder: Path) -> None:
    settings = settings_for(tmp_path, shards=4, length=180, batch=7)
    write(dense_folder, settings, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for missing in (1, 3):
        shard_path(tmp_path / "whole", missing).unlink()
    stats = write(dense_folder, settings, tmp_path / "whole")
    assert contents(tmp_path / "whole") == whole
    assert stats.tokens == 2 * 7 * 180
    for rank in (1, 0):  # two processes, and batches of another size
        write(dense_folder, settings_for(tmp_path, shards=4, length=180, batch=2), tmp_path / "two", rank=rank, world=2)
    assert contents(tmp_path / "two") == whole
    with pytest.raises(EngineError, match="begun with another seed and settings; use the same settings, or"):
        write(dense_folder, settings_for(tmp_path, length=180, seed=1, max_answer=5), tmp_path / "two")


def test_what_was_said_before_is_left_out(tmp_path: Path, dense_folder: Path) -> None:
    path = write_prompts(tmp_path / "one.jsonl", [{"prompt": "Hi"}])
    settings = settings_for(
        tmp_path, prompts=path, prompt_share=1.0, temperatures=((0.0, 1.0),), follow_up=1.0, rows=4, max_answer=120
    )
    stats = write(dense_folder, settings, tmp_path / "out")
    rows = [len(read_shard(shard_path(tmp_path / "out", index))[0]) for index in range(2)]
    assert stats.duplicates == 8 - sum(rows) > 0
    before = contents(tmp_path / "out")
    shard_path(tmp_path / "out", 1).unlink()
    write(dense_folder, settings, tmp_path / "out")
    assert contents(tmp_path / "out") == before, "answers are recalled from the shards that are there"
    assert len(Corpus.load(tmp_path / "out").tokens) == sum(rows)


def test_a_full_disk_in_the_middle(tmp_path: Path, dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, left, fsync = settings_for(tmp_path, shards=3, length=180), [2], os.fsync

    def fills_up(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        with pytest.raises(EngineError, match="disk full after 1 shard"):
            write(dense_folder, settings, tmp_path / "out")
    assert [has_shard(tmp_path / "out", index) for index in range(3)] == [True, False, False]
    write(dense_folder, settings, tmp_path / "out")
    write(dense_folder, settings, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_settings_that_make_no_sense(tmp_path: Path, dense_folder: Path) -> None:
    for changes in ({"rows": 0}, {"follow_up": 1.5}, {"temperatures": ((0.5, 0.9),)}, {"temperatures": ((-1.0, 1.0),)}):
        with pytest.raises(EngineError):
            settings_for(tmp_path, **changes)
    with pytest.raises(EngineError, match="no room after the chat template"):
        write(dense_folder, settings_for(tmp_path, length=10), tmp_path / "out")
    with pytest.raises(EngineError, match="rows of 5000 tokens, the model takes 4096; make them shorter"):
        write(dense_folder, settings_for(tmp_path, length=5000), tmp_path / "out")
    with pytest.raises(EngineError, match=r"no prompt of at most 2 tokens"):
        write(dense_folder, settings_for(tmp_path, length=130), tmp_path / "out")


# ---- what a GPU runs, in Triton's interpreter where there is none ---------------------------------------------------

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, with tensors of a CPU")


@interpreted
def test_the_kernel_attends_as_torch_does(model_folder: Path) -> None:
    pytest.importorskip("triton")
    rows, length, config = 3, 24, load(model_folder).config
    caches = [LockStepCache(config, rows, length, torch.float32, CPU) for _ in range(2)]
    for layer, a in enumerate(a.attention for a in config.layers):
        sink = torch.randn(a.heads) if a.sink else None
        shapes = ((a.heads, a.qk_dim), (a.kv_heads, a.qk_dim), (a.kv_heads, a.v_dim))
        q, k, v = (torch.randn(rows, length, *shape) for shape in shapes)
        whole = PromptAttention(caches[1], slice(0, rows))(layer, q, k, v, scale=0.3, sink=sink)
        for cache in caches:
            PromptAttention(cache, slice(0, rows))(layer, *(x[:, :19] for x in (q, k, v)), scale=0.3, sink=sink)
        positions = torch.full((rows,), 19)
        kernel = KernelAttention(caches[0], positions)
        for position in range(19, 22):
            now = [x[:, position : position + 1] for x in (q, k, v)]
            expected = StepAttention(caches[1], position)(layer, *now, scale=0.3, sink=sink)
            torch.testing.assert_close(expected, whole[:, position : position + 1])
            torch.testing.assert_close(kernel(layer, *now, scale=0.3, sink=sink), expected)
            positions.add_(1)


@interpreted
def test_kernels_write_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folder = make_tiny(tmp_path / "m", family="mimo", seed=1, num_hidden_layers=1)
    model, tokenizer = load(folder), Tokenizer.load(folder)
    settings = DialogueSettings(shards=1, rows=3, length=28, max_answer=4, max_user=3, batch=2)
    template = Template.cut(tokenizer, FOLLOW_UPS[:2])
    plan = plan_shard(settings, template, [], 0)
    results = [
        LockStep(model, tokenizer, template, settings, kernels=k).write(plan, lambda _: None) for k in (False, True)
    ]
    for portable, kernel in zip(*results, strict=True):
        assert torch.equal(portable, kernel)


@pytest.mark.cuda
def test_a_graph_writes_what_single_steps_write(tmp_path: Path, dense_folder: Path) -> None:
    """In fp32, whose choices do not hang on rounding."""
    settings = settings_for(tmp_path, shards=1, rows=6)
    template, [plan] = plans(dense_folder, settings)
    tokenizer = Tokenizer.load(dense_folder)
    model = loader.load_main(dense_folder, torch.float32, torch.device("cuda"), silent)
    with torch.no_grad():
        results = [
            LockStep(model, tokenizer, template, settings, kernels=k).write(plan, lambda _: None) for k in (False, True)
        ]
    for single, graph in zip(*results, strict=True):
        assert torch.equal(single, graph)
