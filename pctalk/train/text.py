"""English sentences to synthesise: a small grammar whose words cover every phone, and sentences that stay held out."""

from __future__ import annotations

import random


def _words(text: str) -> list[str]:
    return text.split()


DETERMINERS = _words(
    """
    the a my your our her his this that every some another one no
    """
)
ADJECTIVES = _words(
    """
    big small warm cool blue brown purple yellow smooth rough humble proud famous favourite thin thick bright broken calm
    clever deep early empty fresh gentle happy heavy joyful large loud lovely modern narrow open perfect polite private
    quick quiet rare round royal sharp shiny silver simple soft square strange sudden sweet tall tiny unusual useful
    velvet vivid weary wide wooden young beige oily awful mobile patient visible fuzzy thoughtful healthy playful peaceful
    """
)
NOUNS = _words(
    """
    apple baby banana boat book bottle box boy bridge brother bubble butter cabin camera cheese church city coffee cook
    cousin doctor dog door dream drum eagle elephant farm father feather film fire fish flower fog forest friend garden
    garage girl goose grape guitar hammer harbour hat hill home horse house island jacket jar jewel journey judge juice
    key king kitchen lamp leaf letter library lion machine map market measure memory message meadow mirror money moon
    mother mountain mouse mouth movie museum music nation neighbour nephew noise ocean office onion orange owl oyster palm
    panda paper parrot path peach pebble pencil people photo piano picture pillow pipe planet plum pocket poem potato
    prize puppy puzzle question queen rabbit radio rain river road robot roof room rope rose sailor salad sandwich school
    ship shoe shop shower singer sister sky soup spoon spring station storm story street sugar summer sun table teacher
    theatre thumb tiger tooth towel tower town toy train treasure tree tribe trousers truth umbrella uncle valley van vase
    village violin vision voice voyage wall watch water wave weather web whale wheel window wolf woman wood world yard
    year youth zebra zoo
    """
)
VERBS = _words(
    """
    bakes beats becomes believes borrows brings brushes builds buys calls carries catches chooses cleans climbs closes
    covers describes draws drinks drops enjoys enters feels fills finds fixes follows forgets gathers gives grows helps
    hides holds imagines improves joins judges jumps keeps knows leaves lifts likes loses loves makes measures meets
    misses mixes moves needs notices observes offers opens orders owns paints passes pays picks places plays prefers
    promises proves pulls pushes reaches reads remembers removes repeats sees sells shows shuts smells solves stops
    studies takes teaches throws touches uses visits wants washes watches wears wins wraps writes
    """
)
INTRANSITIVES = _words(
    """
    arrives laughs sleeps sings smiles speaks swims waits walks whispers works yawns runs falls vanishes
    """
)
ADVERBS = _words(
    """
    above again almost always badly barely before bravely calmly carefully early easily finally gladly happily hardly here
    loudly maybe never often perhaps probably quickly quietly really seldom slowly softly somehow soon suddenly today
    together tomorrow usually very well yesterday
    """
)
PREPOSITIONS = _words(
    """
    above across after against among around before behind below beside beyond from inside into near of off on over past
    through toward under upon with without
    """
)
PRONOUNS = _words(
    """
    I you he she we they somebody everybody nobody Bob Emma Mabel Philip Beth Joy Hugh Faye Zoe Roy Maya Owen Vera
    """
)
NUMBERS = _words(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty hundred
    """
)
OPENERS = (
    "well", "oh", "yes", "no", "hello", "good morning", "please", "thank you", "of course", "by the way", "in fact",
    "to be honest", "at last", "believe me", "mind you", "as far as I know", "above all", "for example", "my friend",
    "excuse me",
)  # fmt: skip
QUESTIONS = (
    "would you", "could you", "do you", "did they", "have we", "may I", "should we", "why do you", "where did you",
    "how would you",
)  # fmt: skip
BASE_VERBS = _words(
    """
    go move open buy pay bring keep make show watch help choose believe improve remember follow borrow prove measure pull
    push join hear say find throw beat play grow view use wash reach teach offer
    """
)

HELD_OUT = (
    "People may boom with joy when both of my brothers bring home a bowl of warm soup.",
    "Seven famous violins were found beneath the museum floor before five.",
    "How much wood would Peter choose to move, if moving wood amused him?",
    "The bee and the sheep agree to sleep beneath the green tree.",
    "Two blue shoes flew through the room to you.",
    "My mother made a promise to simply put the map by the pump.",
    "Father parked the large car far from the calm palm garden.",
    "We measure pleasure by the hour, and boys enjoy the noise.",
    "Perhaps a bumblebee may hum a number for me, but I am happy with a proper song.",
    "Every evening she reads a chapter about the voyage of a small brave ship.",
)


def sentence(rng: random.Random) -> str:
    """One sentence drawn from the grammar; never one of HELD_OUT (the grammar can't make those)."""
    pick = rng.choice

    def noun_phrase() -> str:
        words = [pick(DETERMINERS)] + ([pick(ADJECTIVES)] if rng.random() < 0.6 else []) + [pick(NOUNS)]
        return " ".join(words)

    def place() -> str:
        return f"{pick(PREPOSITIONS)} {noun_phrase()}"

    patterns = (
        lambda: f"{noun_phrase()} {pick(VERBS)} {noun_phrase()} {place()}",
        lambda: f"{pick(OPENERS)}, {pick(PRONOUNS)} {pick(VERBS)} {noun_phrase()}",
        lambda: f"{pick(QUESTIONS)} {pick(BASE_VERBS)} {noun_phrase()} {place()}?",
        lambda: f"{pick(ADVERBS)} {noun_phrase()} {pick(INTRANSITIVES)} {place()}",
        lambda: f"{pick(NUMBERS)} or {pick(NUMBERS)} {pick(ADJECTIVES)} {pick(NOUNS)}s, {pick(NUMBERS)} {pick(NOUNS)}s",
        lambda: f"please {pick(BASE_VERBS)} {noun_phrase()}, and {pick(BASE_VERBS)} {place()}",
        lambda: f"{pick(PRONOUNS)} {pick(INTRANSITIVES)}, but {pick(PRONOUNS)} {pick(ADVERBS)} {pick(VERBS)} {noun_phrase()}",
        lambda: ", ".join(pick(NOUNS) for _ in range(rng.randint(3, 5))),
        lambda: f"{noun_phrase()} and {noun_phrase()} {pick(ADVERBS)} {pick(VERBS)} {noun_phrase()}, {pick(OPENERS)}",
    )  # fmt: skip
    text = pick(patterns)()
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def passage(rng: random.Random, sentences: int) -> str:
    """Several sentences in one string, as one utterance with its pauses."""
    return " ".join(sentence(rng) for _ in range(sentences))
