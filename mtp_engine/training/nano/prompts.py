"""Prompts about animals, children and everyday things: a field narrow enough for a model of 17 M parameters.

`python -m mtp_engine.training.nano.prompts FILE` writes them, one JSON object with `prompt` a line.
"""

import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import click

from mtp_engine.errors import EngineError
from mtp_engine.hub.files import atomically

_LISTS = {
    "animal": "cat dog rabbit mouse fox bear owl duck frog horse cow pig sheep goat hen lion tiger elephant monkey giraffe "
    "zebra penguin seal whale dolphin turtle snail bee ant butterfly spider squirrel hedgehog deer wolf beaver otter "
    "badger parrot crow swan goose kitten puppy pony donkey camel kangaroo koala panda",
    "nature": "brave shy clever lazy curious kind hungry tired lonely proud gentle noisy quiet happy sad small big old young "
    "friendly funny greedy honest patient polite silly sleepy strong tiny wise careful cheerful forgetful helpful jealous "
    "playful scared stubborn thoughtful grumpy",
    "colour": "red blue green yellow white black brown orange pink grey golden silver",
    "person": "girl|boy|farmer|teacher|baker|sailor|doctor|gardener|king|queen|grandmother|grandfather|shepherd|painter|"
    "fisherman|postman|nurse|carpenter|cook|musician|shopkeeper|firefighter|pilot|miller",
    "name": "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Lucy Max Mia Nora Oscar Paul Rose Sam Sara Tom "
    "Tim Lily Ella Finn Julia Mark Nina Peter",
    "place": "in the forest|by the sea|on a farm|in a small village|in the garden|at school|in the mountains|by the river|in a "
    "big city|on an island|in the park|at the zoo|in an old house|in the desert|on a boat|at the market|in the snow|under a "
    "bridge|in a tall tree|at the lake|in the kitchen|on a train|in a castle|at the library",
    "deed": "finds a lost key|learns to share|makes a new friend|gets lost on the way home|helps a stranger|learns to swim|"
    "loses a favourite toy|plants a seed|builds a small house|finds a treasure map|is afraid of the dark|wants to fly|tells a "
    "lie|wins a race|breaks a window|bakes a cake|saves a friend|goes on a long journey|meets a giant|finds a magic stone|"
    "cannot fall asleep|learns to say sorry|looks for the moon|wants to be bigger|hides from the rain|finds an egg|sings for "
    "the first time|shares the last apple|forgets a birthday|learns to ask for help|catches a big fish|sails across the lake|"
    "climbs the highest hill|writes a letter|hears a strange noise|opens a little shop|teaches others to dance|cares for a "
    "sick bird|finds a way out of a cave|waits for spring|paints a picture|gives away a warm coat|follows a butterfly|makes a "
    "wish|learns to be patient|keeps a secret|returns a lost purse|builds a boat|stops being angry|visits an old friend",
    "thing": "chair|table|spoon|cup|lamp|clock|book|pencil|bicycle|car|train|boat|ball|kite|drum|bell|key|mirror|umbrella|coat|"
    "hat|shoe|blanket|pillow|basket|bottle|box|candle|bridge|ladder|hammer|rope|bucket|broom|window|door|garden|tree|flower|"
    "apple|loaf of bread|bowl of soup|cake|egg|pot of honey|glass of milk|river|mountain|cloud|rainbow|star|moon|"
    "stone|leaf|feather|shell|nest|house|school|kitchen|library|market|park|toothbrush|pair of scissors|pair of glasses|"
    "telephone|map|letter|coin|bag|bed|towel|piece of soap|fridge|oven|scarf|glove|button|needle",
    "sky": "sunny rainy snowy windy foggy stormy cloudy cold warm quiet",
    "season": "spring|summer|autumn|winter",
    "fact": "the sky is blue|leaves fall in autumn|birds fly south|ice melts|we need to sleep|we brush our teeth|the moon "
    "changes its shape|plants need water|it rains|the sea is salty|cats purr|dogs wag their tails|bees make honey|we have "
    "seasons|the sun is hot|stars twinkle|fish can breathe under water|ducks do not get wet|we should wash our hands|bread "
    "rises|boats float|stones sink|thunder is loud|we see lightning first|snow is white|bears sleep in winter|spiders make "
    "webs|owls are awake at night|leaves are green|flowers smell good|we get hungry|we sneeze|we cry|we laugh|hair grows|we "
    "have bones|the heart beats|apples fall down|magnets stick to iron|glass breaks|soap cleans|water boils|shadows are long "
    "in the evening|the wind blows|rivers flow to the sea|trees are important|we should not waste water|we should eat "
    "vegetables|we should be honest|friends are important|reading is good|exercise is good for us|we must look before we "
    "cross the road|sharing is kind|milk goes sour|metal feels cold|balloons go up|mirrors show our face|echoes come back|"
    "rainbows have colours|day follows night|the earth turns|worms are useful|frogs jump|snails have shells|sheep have wool",
    "adult": "mother|father|teacher|grandmother|grandfather|older sister|older brother|aunt|uncle|neighbour",
    "friend": "friend|brother|sister|cousin|classmate|neighbour|dog|cat|mother|father|grandmother|grandfather|teacher|son|"
    "daughter",
    "feeling": "sad angry afraid bored lonely nervous tired jealous worried disappointed",
    "event": "a birthday party|a day at the beach|a lost cat|a new school|a trip to the mountains|a broken toy|the first snow|a "
    "rainy holiday|a school play|a new baby in the family|a visit to the zoo|a garden full of flowers|a football game|a walk "
    "in the forest|learning to ride a bicycle|a picnic|a sick pet|a nice present|a bad dream|moving to a new house",
    "skill": "ride a bicycle|bake bread|plant a tree|wash the dishes|make a sandwich|tie your shoes|learn a song|clean a room|"
    "make a paper boat|draw a cat|cook an egg|write a letter|save money|make a friend|fold a shirt|grow tomatoes|build a "
    "sandcastle|wrap a present|make tea|read a map|take care of a plant|prepare for a test|fall asleep|make a salad|feed the "
    "birds|set the table|pack a bag|be a good listener|say sorry|learn new words",
    "number": "two three four five",
    "age": "4 5 6 7 8 9 10",
}  # fmt: skip
_TEMPLATES = {  # with how often each is taken
    "Write a short story for children about {a nature} {animal} who {deed}.": 40,
    "Write a short story about {a nature} {animal} and {a nature} {animal} {place}.": 14,
    "Tell me a short story about {name}, {a nature} {person} who {deed}.": 14,
    "Tell me a bedtime story about {a nature} {colour} {animal} {place}.": 8,
    "Write a story in {number} sentences about {a person} and {a nature} {animal} who {deed}.": 6,
    "Write a short poem about {a nature} {animal} in {season}.": 2,
    "Write a short letter to your {adult} about {event}.": 1,
    "Describe {a colour} {thing} in simple words.": 3,
    "Describe {a sky} day {place}.": 1,
    "Describe {a nature} {animal} {place}.": 3,
    "Explain to a {age}-year-old child why {fact}.": 2,
    "Explain to a child why {fact}. Use {number} short sentences.": 1,
    "What is {a thing} used for?": 1,
    "What can {a person} do with {a thing}?": 2,
    "How does {a animal} live in {season}?": 1,
    "What is the difference between {a animal} and {a animal}?": 2,
    "What is the difference between {a thing} and {a thing}?": 2,
    "How do you {skill}? Give {number} simple steps.": 1,
    "My {friend} is {feeling} because of {event}. What can I do?": 2,
    "Name {number} things that {a person} needs {place}.": 1,
}
_SLOT = re.compile(r"\{(a )?(\w+)\}")


def prompts(count: int, seed: int = 0) -> Iterator[str]:
    """`count` different prompts; the same seed gives the same ones, and more begin with fewer. Raises EngineError if
    there are not so many."""
    lists = {name: text.split("|" if "|" in text else " ") for name, text in _LISTS.items()}
    rng, seen, vain = random.Random(seed), set[str](), 0
    templates, weights = list(_TEMPLATES), list(_TEMPLATES.values())
    while len(seen) < count:
        prompt = _fill(rng.choices(templates, weights)[0], lists, rng)
        if prompt in seen:
            vain += 1
            if vain > 100 + 20 * count:
                raise EngineError(f"there are no {count:,} different prompts: ask for at most {len(seen):,}")
            continue
        seen.add(prompt)
        yield prompt


def _fill(template: str, lists: dict[str, list[str]], rng: random.Random) -> str:
    """Words of one list that stand in one prompt differ."""
    taken: set[str] = set()

    def word(match: re.Match[str]) -> str:
        chosen = rng.choice(lists[match[2]])
        while chosen in taken and len(lists[match[2]]) > len(taken):
            chosen = rng.choice(lists[match[2]])
        taken.add(chosen)
        return f"{_article(chosen)} {chosen}" if match[1] else chosen

    return _SLOT.sub(word, template)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" or word.startswith("honest") else "a"


def is_held_out(prompt: str) -> bool:
    """One prompt in 64 is never trained on, by a hash of its text."""
    return zlib.crc32(prompt.encode()) % 64 == 0


def write_prompts(file: Path, count: int, seed: int = 0) -> None:
    """`count` prompts into a file, one JSON object a line."""
    text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(count, seed))
    atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--count", type=click.IntRange(min=1), default=200_000, show_default=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same prompts.")
def main(file: Path, count: int, seed: int) -> None:
    """Write prompts to FILE, one JSON object a line, for a model to answer."""
    write_prompts(file, count, seed)


if __name__ == "__main__":
    main()
