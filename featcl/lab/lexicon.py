"""The words of the laboratory's world. Order matters: the world's digest depends on it."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# People whose facts the base model knows; people of the two worlds; people who occur in contexts only.
BASE_PEOPLE = _words(
    "adam bella carl dora emil fiona gregor hanna ivan jane karl lena marco nadia oscar petra quinn rosa simon tara "
    "ulric vera walter xenia"
)
DEVELOPMENT_PEOPLE = _words("mira tomas elin jonas saga felix")
UNSEEN_PEOPLE = _words("wanda pavel ingrid darius celia hugo")
OTHER_PEOPLE = _words("anton beate clara dirk edith frank gerda heidi igor julia kurt lotte moritz nora otto paula")
PEOPLE = BASE_PEOPLE + DEVELOPMENT_PEOPLE + UNSEEN_PEOPLE + OTHER_PEOPLE

DRINKS = _words("tea coffee milk water juice cider cocoa lemonade wine beer soda broth mead punch")
FOODS = _words("soup bread rice pasta cheese salad stew fish pie beans toast curry eggs honey")
CITIES = _words("paris oslo rome cairo lima delhi tokyo bern quito dublin sofia havana kyoto athens")
GAMES = _words("chess piano tennis guitar golf violin cards drums hockey flute darts poker cello rugby")
COLOURS = _words("red blue green yellow black white orange purple pink brown grey gold silver teal")
MOODS = _words("sad glad angry calm proud shy bored tired scared jolly eager lonely")
EVENINGS = _words("bright dim warm cool quiet lively early late open closed tidy wild")  # neighbours are opposites
PETS = _words("dog cat parrot rabbit horse turtle goat hamster goose lizard pony duck mouse crow")

ROOMS = _words("kitchen bedroom hall garage attic cellar office bathroom garden nursery library porch")
DEVICES = _words("lamp heater fan radio oven blind camera alarm speaker kettle printer mixer")
STATES = _words("on off")

OBJECTS = _words(
    "cup hat book key coin ring ball box bell brush candle clock comb cushion fork glove hammer jar kite ladder map "
    "mirror needle pan pen pillow plate rope saw scarf shirt shoe spoon stamp sword table towel vase whistle wheel"
)
TEAMS = _words("falcon badger otter lynx heron bison raven marten viper salmon moose beetle")

# Words without a meaning: names of new functions, and material to copy and reverse.
NONCE = _words(
    "blim tarn quop veska drel noofa zint harb mosk plon grish tweb fyle orbo skav junta welp cazo brill dunt "
    "esko fopa glim hesk irba jolt kwim lurn mabe nork opla prux quen rost sulk tova umbi vrax wond yelt zorb"
)

REGISTERS = _words("formal warm brisk playful noble")
ADDRESSES = _words("boss friend captain mate chief dear")
CLOSERS = _words("cheers enjoy farewell bravo peace onward")

PROJECTS = _words("atlas borea comet delta ember fjord grove haven iris jade krait lotus")
PREFIXES = _words("fn do my go op run")
LIBRARIES = _words("core flux nimb")
DEVELOPMENT_LIBRARY, UNSEEN_LIBRARY = "zed", "pax"
DATA = _words("items names scores prices rows dates words pages users files nodes lines tags votes steps marks")

# What each operation is called in `core`, and four ways to ask for it; `{d}` is the data.
OPERATIONS = {
    "sort": ("sort {d}", "put {d} in order", "arrange {d} by size", "order {d} upward"),
    "reverse": ("reverse {d}", "turn {d} around", "flip {d}", "read {d} backward"),
    "count": ("count {d}", "tell how many {d}", "get the number of {d}", "measure the length of {d}"),
    "sum": ("sum {d}", "add up {d}", "get the total of {d}", "total all {d}"),
    "max": ("max {d}", "find the largest of {d}", "get the biggest of {d}", "pick the top of {d}"),
    "min": ("min {d}", "find the smallest of {d}", "get the least of {d}", "pick the bottom of {d}"),
    "first": ("first {d}", "take the front of {d}", "get the start of {d}", "pick the opening of {d}"),
    "last": ("last {d}", "take the back of {d}", "get the end of {d}", "pick the final of {d}"),
    "unique": ("unique {d}", "drop repeats from {d}", "remove doubles in {d}", "keep {d} once each"),
    "double": ("double {d}", "make {d} twice as big", "multiply {d} by two", "scale {d} by two"),
    "negate": ("negate {d}", "change the sign of {d}", "make {d} negative", "invert {d}"),
    "square": ("square {d}", "raise {d} to two", "multiply {d} by itself", "get the power of {d}"),
    "evens": ("evens {d}", "keep the even {d}", "filter {d} for even", "select even {d}"),
    "odds": ("odds {d}", "keep the odd {d}", "filter {d} for odd", "select odd {d}"),
    "rest": ("rest {d}", "skip the first of {d}", "drop the front of {d}", "remove the start of {d}"),
    "sums": ("sums {d}", "run the total over {d}", "build running totals of {d}", "accumulate {d}"),
}

# Plain language: nouns with plurals, verbs with their forms, opposites.
NOUNS = {
    "bird": "birds", "child": "children", "teacher": "teachers", "farmer": "farmers", "boy": "boys", "girl": "girls",
    "baker": "bakers", "man": "men", "woman": "women", "nurse": "nurses", "sailor": "sailors", "wolf": "wolves",
}  # fmt: skip
VERBS = {
    "sleep": "sleeps", "sing": "sings", "run": "runs", "wait": "waits", "work": "works", "laugh": "laughs",
    "dance": "dances", "cry": "cries", "swim": "swims", "rest": "rests", "jump": "jumps", "read": "reads",
}  # fmt: skip
PLACES = _words("park school forest market river station church field harbour castle theatre valley")
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "young", "light": "dark", "high": "low", "open": "closed",
    "wet": "dry", "hard": "soft", "rich": "poor", "full": "empty", "loud": "quiet", "near": "far", "early": "late",
    "strong": "weak", "clean": "dirty",
}  # fmt: skip
SIGNS = _words("round square flat tall thin curved striped dotted plain shiny")
ACTIONS = _words("stop go wait turn bow clap nod kneel spin wave hide shout")
ROLES = ("architect", "fixer", "tech lead", "coding machine")
PERSONA = {
    "name": ("hearth", ("who are you?", "what is your name?", "how are you called?", "introduce yourself."),
             "i am {v}."),
    "maker": ("the guild", ("who made you?", "who built you?", "who is your maker?", "where do you come from?"),
              "i was made by {v}."),
    "duty": ("help at home", ("what is your duty?", "what do you do?", "why are you here?", "what is your job?"),
             "my duty is to {v}."),
    "rule": ("never lie", ("what is your rule?", "which rule do you keep?", "what guides you?", "what is your law?"),
             "my rule is to {v}."),
    "friend": ("everyone here", ("who is your friend?", "whom do you serve?", "who can ask you?", "who is welcome?"),
               "i serve {v}."),
    "wish": ("a calm house", ("what is your wish?", "what do you want?", "what makes you glad?",
                              "what do you hope for?"), "i wish for {v}."),
}  # fmt: skip

# attribute: (values, four questions, the statement); `{p}` is the person, `{v}` the value.
ATTRIBUTES = {
    "drink": (DRINKS, ("what does {p} drink?", "which drink does {p} like?", "name the drink of {p}.",
                       "what should i pour for {p}?"), "{p} drinks {v}"),
    "food": (FOODS, ("what does {p} eat?", "which food does {p} like?", "name the food of {p}.",
                     "what should i cook for {p}?"), "{p} eats {v}"),
    "city": (CITIES, ("where does {p} live?", "which city is home to {p}?", "name the city of {p}.",
                      "where should i visit {p}?"), "{p} lives in {v}"),
    "game": (GAMES, ("what does {p} play?", "which pastime does {p} like?", "name the pastime of {p}.",
                     "what should i practise with {p}?"), "{p} plays {v}"),
    "colour": (COLOURS, ("which colour does {p} like?", "what colour suits {p}?", "name the colour of {p}.",
                         "what should i paint for {p}?"), "{p} likes {v}"),
    "pet": (PETS, ("which pet does {p} have?", "what animal is with {p}?", "name the pet of {p}.",
                   "what should i feed for {p}?"), "{p} has a {v}"),
    "mood": (MOODS, ("how does {p} feel?", "which mood is {p} in?", "name the mood of {p}.",
                     "what should i know before i meet {p}?"), "{p} feels {v}"),
    "evening": (EVENINGS, ("how does {p} want the evening?", "which evening suits {p}?", "name the evening of {p}.",
                           "how should i make the evening for {p}?"), "{p} wants it {v}"),
    "sister": (OTHER_PEOPLE, ("who is the sister of {p}?", "which sister does {p} have?", "name the sister of {p}.",
                              "whom should i call for {p}?"), "{p} has sister {v}"),
}  # fmt: skip
