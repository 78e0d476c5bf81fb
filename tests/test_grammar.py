"""Constraints: every node's choice obeys them, drafts do too, and the text is that of plain decoding."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from test_decode_loop import CPU, SLOTS, Models, decode, make_loop, prompts
from tiny import Sums

from mtp_engine import Engine, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config import Structure
from mtp_engine.drafters import MTPDrafter, RootDrafter
from mtp_engine.errors import EngineError
from mtp_engine.hub import hub
from mtp_engine.sampling.masks import Guide, unpack
from mtp_engine.sampling.structure import Closer, Grammars, GrammarState
from mtp_engine.text.tool_calls import call_schema
from mtp_engine.tree import DraftTree


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("grammar"))


@pytest.mark.parametrize("name", ["4x2x2", "tree:7"])
def test_trees_are_drafted_and_verified_under_a_constraint(models: Models, name: str) -> None:
    wanted = [
        SamplingParams(
            max_tokens=30, temperature=i / 2, seed=i, frequency_penalty=0.5,
            structure=None if i == 1 else Structure(regex="any"),
        )
        for i in range(SLOTS)
    ]  # fmt: skip
    plain = decode(make_loop(models.main, RootDrafter(), grammars=lambda _: Sums()), prompts(), wanted)
    drafter = MTPDrafter(models.mtp, TreeShape.parse(name), slots=SLOTS)
    loop = make_loop(models.main, drafter, grammars=lambda _: Sums())
    trees, draft = [], drafter.draft

    def spied(batch: Any) -> DraftTree:
        tree = draft(batch)
        trees.append((tree, [(c := r.trail.constraint) and (c, list(c.answer)) for r in loop._members[0].requests]))
        return tree

    drafter.draft = spied  # type: ignore[method-assign]
    found = decode(loop, prompts(), wanted)
    assert [request.output for request in found] == [request.output for request in plain]
    assert any(sum(request.output[:k]) % 3 == 2 for request in [plain[1]] for k in range(1, 30)), "it forbids something"
    for tree, constraints in trees:
        for b, known in enumerate(constraints):
            for node in range(1, int(tree.size[b])):
                if known:
                    assert obeys(tree, b, node, *known)


def obeys(tree: DraftTree, b: int, node: int, constraint: Sums, answer: list[int]) -> bool:
    path = []
    while node > 0:
        path.append(int(tree.tokens[b, node]))
        node = int(tree.parents[b, node])
    text = [*answer, *path[::-1]]
    return constraint.allows(text[:-1], text[-1])


def test_a_structure_needs_grammars(models: Models) -> None:
    with pytest.raises(EngineError, match="no grammars"):
        make_loop(models.main, RootDrafter()).add([1], SamplingParams(structure=Structure(regex="a")))
    with pytest.raises(EngineError, match="exactly one"):
        Structure(regex="a", json="{}")


# ---- llguidance and the default model ------------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1,
        "maximum": 9}}, "required": ["city", "days"], "additionalProperties": False}}},
    {"name": "stop"},
]  # fmt: skip
STRUCTURES = {
    "json": Structure(json=json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 10}, "age": {
        "type": "integer", "minimum": 0, "maximum": 120}}, "required": ["name", "age"], "additionalProperties": False})),
    "regex": Structure(regex=r"[A-Z][a-z]{2,8} (was|is) born in [0-9]{4}\."),
    "grammar": Structure(grammar='start: NUMBER ("+" NUMBER)? "=" NUMBER\nNUMBER: /[0-9]{1,3}/'),
    "tool": Structure(json=json.dumps(call_schema(TOOLS))),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    pytest.importorskip("llguidance")
    return Engine.load(config=EngineConfig(tree=TreeShape.parse("4x2"), max_context=512, max_batch=4))


def valid(name: str, text: str) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    if STRUCTURES[name].json:
        jsonschema.validate(json.loads(text), json.loads(STRUCTURES[name].json))
        return True
    pattern = STRUCTURES[name].regex or r"[0-9]{1,3}(\+[0-9]{1,3})?=[0-9]{1,3}"
    return re.fullmatch(pattern, text) is not None


@pytest.mark.model
def test_a_step_in_flight_that_found_no_token_leaves_a_structure_at_rest(engine: Engine) -> None:
    """Its request ends when it lands; meanwhile the next step is launched, behind a token of -1."""
    [request] = engine.requests("x", SamplingParams(structure=Structure(regex="[a-z]+")))
    state, path = request.trail.constraint, (*engine.encode("a"), -1)
    assert isinstance(state, GrammarState)
    assert bool((state.mask(path) == -1).all())


@pytest.mark.model
@pytest.mark.parametrize("name", STRUCTURES)
def test_answers_are_valid_and_those_of_plain_decoding(engine: Engine, name: str) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=5, structure=STRUCTURES[name], n=2)
    [drafted] = engine.generate(["Tell me about a person you know, or the weather.\n"], params)
    [plain] = engine.generate(
        ["Tell me about a person you know, or the weather.\n"], SamplingParams(**{**vars(params), "speculate": False})
    )
    for a, b in zip((drafted, *drafted.others), (plain, *plain.others), strict=True):
        assert a.token_ids == b.token_ids
        assert a.finish_reason == "stop"
        assert valid(name, a.text)
    assert len({a.text for a in (drafted, *drafted.others)}) > 1


@pytest.mark.model
@pytest.mark.parametrize(
    "wrong", [Structure(json="{"), Structure(json='{"type": 3}'), Structure(regex="("), Structure(grammar="?")]
)
def test_a_wrong_structure_is_refused(engine: Engine, wrong: Structure) -> None:
    with pytest.raises(EngineError, match=r"structure|schema"):
        engine.generate(["x"], SamplingParams(structure=wrong))
    assert not engine.loop.requests
    assert not engine.loop.requests
    assert engine.model.embedding.device == CPU


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (Structure(regex="a("), "unclosed group"), (Structure(json='{"type": "banana"}'), "banana"),
        (Structure(json="[1]"), "not an object"), (Structure(json="[" * 9000), "not JSON"),
        (Structure(grammar="start: ("), "Expected"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_structure_is_said_to_the_end(structure: Structure, words: str) -> None:
    with Engine.load("mimo-nano", EngineConfig(device="cpu", threads=1, max_context=64)) as engine:
        with pytest.raises(EngineError, match=words) as error:
            engine.generate(["a"], SamplingParams(structure=structure))
        assert "\n" not in str(error.value)


def test_an_answer_knows_whether_it_matches() -> None:
    """Cut off by its limit it does not, unless it may end anywhere; ended by its grammar, or without one, it does."""
    with Engine.load("mimo-nano", EngineConfig(device="cpu", threads=1, max_context=128)) as engine:

        def answer(regex: str, **params: Any) -> tuple[str, bool]:
            structure = Structure(regex=regex) if regex else None
            [found] = engine.generate(["Once"], SamplingParams(structure=structure, seed=1, **params))
            return found.finish_reason, found.complete

        assert answer("[a-z]{90}", max_tokens=5) == ("length", False)
        assert answer("[a-z ]+", max_tokens=5) == ("length", True)
        assert answer("yes|no", max_tokens=20) == ("stop", True)
        assert answer("ab[a-z]{90}", max_tokens=20, stop="b") == ("stop", False)
        assert answer("", max_tokens=5) == ("length", True)


def test_masks_of_many_nodes_are_those_of_each_alone() -> None:
    """Of three answers beside one without a structure; drafts that may not follow, ends of answers, and steps in flight."""
    schema = json.dumps({"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 2})
    with Engine.load("mimo-nano", EngineConfig(device="cpu", threads=1, max_context=64)) as engine:
        model, tokenizer = engine.model, engine.tokenizer
        grammars, copying = (Grammars(tokenizer.folder, model.vocab_size, tokenizer.eos_ids).start for _ in range(2))
        structures = [Structure(regex="[a-z]{1,3}"), Structure(json=schema, within=40), Structure(json=schema)]
        states = [grammars(each) for each in structures]
        alone = [copying(each) for each in structures]
        said, end = tokenizer.encode('["a'), tokenizer.eos_ids[0]
        words = -(-engine.model.vocab_size // 32)
        a, z, quote = (tokenizer.encode(f'["{text}')[-1] for text in ("a", "z", '"'))
    drafts = [[0, a, z, end, a, a], [0, said[0], said[0], a, a, z], [0, quote, a, end, a, z]]
    parents = [[-1, 0, 1, 1, 3, 2], [-1, 0, 1, 0, 3, 3], [-1, 0, 0, 1, 2, 4]]
    for state in (states[2], alone[2]):
        state.advance(said[:1])
    guide, asked = Guide([None, *states]), [(), (said[0],), tuple(said[1:])]
    guide.begin([None, *asked], lambda each: each or ())
    masks = torch.full((4, 6, words), 7, dtype=torch.int32)
    guide.fill(masks, [[0] * 6, *drafts], [[-1] * 6, *parents], [1, 6, 5, 6])
    assert (masks[0] == 7).all()
    assert (masks[2, 5] == 7).all()
    for row, (state, before) in enumerate(zip(alone, asked, strict=True)):
        for node in range(5 if row == 1 else 6):
            path, at = list[int](), node
            while at > 0:
                path, at = [drafts[row][at], *path], parents[row][at]
            assert torch.equal(masks[row + 1, node], state.mask((*before, *path))), (row, node)
    assert len({tuple(mask.tolist()) for mask in masks.flatten(0, 1)}) > 8


def doubled(folder: Path, vocab: int, texts: Sequence[str], target: Path) -> int:
    """A copy of a tokenizer with one more token for each of these texts, of the same bytes as one that it has. Returns how
    many tokens it has then."""
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    stored["added_tokens"] += [{"id": vocab + at, "content": text, **flags} for at, text in enumerate(texts)]
    (target / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    return vocab + len(texts)


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize("within", [0, 60])
def test_what_fits_is_what_masks_allow(within: int, doubles: bool, tmp_path: Path) -> None:
    """One token after another, beyond the end of an answer, too; and what is expected counts at once, but for the end.
    doubles: where tokens have the same bytes."""
    schema = json.dumps({"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 2})
    record = json.dumps(of(name={**TEXT, "maxLength": 4}, kind={"enum": ["yes", "perhaps"]}, born=WHOLE))
    with Engine.load("mimo-nano", EngineConfig(device="cpu", threads=1, max_context=64)) as engine:
        tokenizer, vocab = engine.tokenizer, engine.model.vocab_size
        short = [token for text in (" x", " y", '"', " n", " b", "n", "p", "y") for token in tokenizer.encode(text)]
        folder = tokenizer.folder
    if doubles:
        before, folder = vocab, tmp_path
        vocab = doubled(tokenizer.folder, vocab, [' "', '"', " ", '":', ",", "x", " n", " k"], folder)
        short += [*range(before, vocab)] * 2
    start = Grammars(folder, vocab, tokenizer.eos_ids).start
    rng, counts = random.Random(2), list[int]()
    structures = [
        Structure(regex="(ab|[a-c]x){1,9}"),
        *(Structure(json=each, within=within) for each in (schema, record)),
    ]
    for structure in structures * 5:
        state, twin, said = start(structure), start(structure), list[int]()
        while len(said) < 50:
            path, fit = list[int](), None
            for _ in range(5):
                allowed = unpack(twin.mask(tuple(path))).nonzero()[:, 0].tolist()
                token = rng.choice(allowed) if rng.random() < 0.8 else rng.choice([*range(vocab), -1])
                token = rng.choice(short) if rng.random() < 0.2 else token  # as text it may be allowed, as a token not
                fit = len(path) if fit is None and token not in allowed else fit
                path.append(token)
                if fit is not None:
                    break
            counts.append(len(path) if fit is None else fit)
            assert state.fits((), path) == counts[-1]
            assert state.fits(tuple(path[:1]), path[1:]) == counts[-1] - 1 or not counts[-1]
            kept = path[: min(counts[-1], 2)]
            for _ in range(2):  # steps in flight may be told of twice, and are asked behind
                state.expect(kept)
            mask = state.mask(())
            for token in kept:
                assert state.complete == twin.complete
                for each in (state, twin):
                    each.advance([token])
            assert torch.equal(mask, twin.mask(()))
            assert state.complete == twin.complete
            if set(kept) & set(tokenizer.eos_ids):
                break
            said += kept
    assert set(counts) == {0, 1, 2, 3, 4, 5}


# ---- answers that end in time --------------------------------------------------------------------------------------

TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
KIDS = {"type": "array", "items": {"$ref": "#/$defs/n"}}
CODE = {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}


def of(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has all of them."""
    return {"type": "object", "properties": properties, "required": list(properties)}


CLOSED: dict[str, dict[str, Any]] = {
    "city": of(name=TEXT, people=WHOLE), "nested": {"$defs": {"n": of(v=NUMBER, kids=KIDS)}, "$ref": "#/$defs/n"},
    "anything": {"type": "object"}, "pattern": of(code=CODE),
    "list": {"type": "array", "items": {"anyOf": [{**TEXT, "minLength": 3}, {"enum": ["one", "two"]}]}, "minItems": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_json_ends_within_its_limit_as_plain_decoding_has_it(name: str) -> None:
    with Engine.load(hub.NANO, EngineConfig(tree="chain:3", max_batch=4, threads=1)) as engine:
        wanted = json.dumps(CLOSED[name])
        params = [
            SamplingParams(max_tokens=most, temperature=1.2, seed=seed, structure=Structure(json=wanted, within=most))
            for most in (36, 64)
            for seed in range(3)
        ]
        prompts = ["Tell me everything about it, at length: "] * len(params)
        answers, plain = engine.generate(prompts, params), engine.undrafted().generate(prompts, params)
    for answer, other in zip(answers, plain, strict=True):
        jsonschema.validate(json.loads(answer.text), CLOSED[name])
        assert answer.finish_reason == "stop"
        assert answer.token_ids == other.token_ids
    assert sum(any(answer.drafted) for answer in answers) > 1, "nothing was drafted"


def test_a_limit_changes_nothing_that_is_far_from_it() -> None:
    free, bounded = (Structure(json=json.dumps(CLOSED["pattern"]), within=within) for within in (0, 400))
    with Engine.load(hub.NANO, EngineConfig(max_batch=1, threads=1)) as engine:
        one, other = (
            engine.generate(["A code: "], SamplingParams(max_tokens=300, seed=1, temperature=0.7, structure=each))[0]
            for each in (free, bounded)
        )
    assert one.token_ids == other.token_ids


@pytest.mark.parametrize("name", CLOSED)
def test_what_must_follow_does_not_depend_on_what_was_asked(name: str) -> None:
    """When an end is looked for again is decided by the answer: not by drafts, nor by how many tokens come at a time."""
    with Engine.load(hub.NANO, EngineConfig(max_batch=1, threads=1)) as engine:
        grammars = engine.loop.intake.grammars
    assert grammars is not None
    rng, only = random.Random(3), 0
    for within in (40, 90):
        one, other, ahead = (*(grammars(Structure(json=json.dumps(CLOSED[name]), within=within)) for _ in "ab"), [])
        for _ in range(within):
            bits = one.mask(())
            assert torch.equal(bits, other.mask(tuple(ahead)))
            allowed = unpack(bits).nonzero()[:, 0].tolist()
            only += len(allowed) == 1
            token = rng.choice(allowed)
            for draft in rng.sample(allowed, min(2, len(allowed))):
                other.mask((*ahead, draft))
            one.advance([token])
            ahead.append(token)
            if len(ahead) > rng.randrange(6):
                other.advance(ahead)
                ahead = []
            if one.complete:
                break
        assert one.complete
    assert only


def test_where_an_answer_begins_its_end_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When its structure is compiled: in a step it would hold up everybody."""
    wanted = Structure(json=json.dumps(of(x=NUMBER)), within=40)
    with Engine.load(hub.NANO, EngineConfig(max_batch=1, threads=1)) as engine:
        grammars = engine.loop.intake.grammars
        assert grammars is not None
        first = grammars(wanted)
        monkeypatch.setattr(Closer, "look", None)
        assert first.forced(()) == grammars(wanted).forced(())
        assert torch.equal(first.mask(()), grammars(wanted).mask(()))


def test_a_number_that_does_not_end_is_ended() -> None:
    """Digits may follow for ever, and a comma must come before the brace."""
    schema = json.dumps(of(x=NUMBER, y=NUMBER))
    with Engine.load(hub.NANO, EngineConfig(max_batch=1, threads=1)) as engine:
        grammars, tokenizer = engine.loop.intake.grammars, engine.tokenizer
        assert grammars is not None
        state, said = grammars(Structure(json=schema, within=96)), tokenizer.encode('{"x": 0.' + "7" * 40)
        assert len(said) < 60
        state.advance(said)
        while len(said) < 96 and not state.complete:
            bits = [word >> bit & 1 for word in state.mask(()).tolist() for bit in range(32)]
            seven = tokenizer.encode("7")[-1]
            said.append(seven if bits[seven] else bits.index(1))
            state.advance(said[-1:])
        jsonschema.validate(json.loads(tokenizer.decode(said)), json.loads(schema))
