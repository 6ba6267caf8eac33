"""Words that the test prompts are made of, in none of the prompts that the families were trained or scored on."""

# ---- the six instructions, for the SmolLM2 family: instruction id, arguments of its checker, ways to say it
FORMAT = {
    "change_case:english_capital": (
        {},
        (
            "Give the text in all capital letters.",
            "All letters of the text must be uppercase.",
            "Your text must be in capital letters.",
        ),
    ),
    "punctuation:no_comma": (
        {},
        (
            "Do not write any commas.",
            "Leave out commas in your response.",
            "Your text may not contain any commas.",
        ),
    ),
    "detectable_format:title": (
        {},
        (
            "Put a title in double angular brackets at the top.",
            "The text should have a title in double angular brackets.",
            "Begin with a title and wrap it in double angular brackets.",
            "Include a title, set in double angular brackets.",
        ),
    ),
    "startend:quotation": (
        {},
        (
            "The full text should be placed between double quotation marks.",
            "Begin with a double quotation mark and finish with one.",
            "Present the entire text as a quotation in double quotes.",
            "Use double quotation marks around all that you write.",
        ),
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        (
            "Highlight two or more parts of the text with asterisks.",
            "At least two phrases should be highlighted in markdown, such as *phrase*.",
            "Use asterisks to highlight at least two sections.",
        ),
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        (
            "The text must have 2 sections. Begin each section with SECTION X.",
            "Write two sections and mark their beginnings with SECTION X, such as: SECTION 1.",
            "Write it in two parts, with SECTION and a number at the start of each.",
        ),
    ),
}
FORMAT_FRAMES = (
    "Write a few lines about {topic}.",
    "What should a visitor know about {topic}?",
    "How would you introduce {topic} to a friend?",
    "Say something useful about {topic}.",
    "Give a brief overview of {topic}.",
    "In which ways is {topic} worth knowing?",
)
FORMAT_TOPICS = (
    "violins", "saffron", "tides", "origami", "ferries", "beavers", "canals", "maple syrup", "jazz", "hammocks",
    "waterfalls", "crosswords", "parrots", "knitting", "opera", "limestone caves", "carnivals", "hedgehogs",
    "typewriters", "vineyards", "meteor showers", "kites", "sourdough", "tulips", "sledges", "harbours", "ballet",
    "cactus plants", "marathons", "puppet theatre", "wolves", "cinnamon", "skyscrapers", "sundials", "ice skating",
    "elevators", "swallows", "watercolours", "postage", "orchids", "thunderstorms", "rowing", "flea markets",
    "zebras", "wooden toys", "hot springs", "street musicians", "peppermint", "moths", "barns",
)  # fmt: skip

# ---- word problems
NAMES = (
    "Aisha", "Bruno", "Carmen", "Dmitri", "Elena", "Farid", "Gwen", "Harold", "Ines", "Jonas", "Kofi", "Lena",
    "Marek", "Nadia", "Omar", "Petra", "Quincy", "Ruth", "Stefan", "Thea", "Ursula", "Vera", "Wanda", "Xavier",
    "Yusuf", "Zoe", "Agnes", "Boris", "Celia", "Diego",
)  # fmt: skip
THINGS = (
    "buttons", "candles", "lemons", "ribbons", "spoons", "tickets", "pebbles", "umbrellas", "magnets", "feathers",
    "bottles", "tiles", "peaches", "keys", "postcards", "muffins",
)  # fmt: skip

PROBLEMS = {
    "give": "{name} has {many} {what} and sells {more} {what}. How many {what} are left?",
    "add": "{name} had {start} {what} and found {more} more {what}. How many {what} does {name} have in all?",
    "packs": "{name} has {start} {what}. {name} gets {few} packs with {each} {what} in each pack. "
    "How many {what} does {name} have now?",
    "drop": "{name} has {many} {what}, drops {more} of them and then picks up {few} more. "
    "How many {what} does {name} have?",
    "trays": "There are {bunch} trays with {each} {what} on each tray. How many {what} is that in total?",
    "divide": "{name} splits {all} {what} equally among {bunch} cousins. How many {what} does each cousin get?",
}

# ---- people
JOBS = (
    "carpenter", "dentist", "florist", "gardener", "journalist", "plumber", "sailor", "singer", "tailor", "translator",
    "waiter", "butcher", "barber", "driver", "potter", "shepherd",
)  # fmt: skip
CITIES = (
    "Berlin", "Lagos", "Seoul", "Vienna", "Lisbon", "Nairobi", "Dublin", "Sydney", "Athens", "Chicago", "Toronto",
    "Havana", "Warsaw", "Munich", "Bogota", "Hanoi", "Brussels", "Geneva", "Manila", "Miami",
)  # fmt: skip
JSON_ORDERS = (
    "Write the person's name, age, job and city as a JSON object.",
    "Give me JSON with the keys name, age, job and city for this person.",
    "From the sentence below, fill a JSON object with name, age, job, city.",
    "Convert the following to JSON, using the keys name, age, job and city.",
)
PEOPLE = (
    "{name}, {age}, has been a {job} in {city} for many years.",
    "The {job} {name} lives in {city} and is {age} years old.",
    "{name} is {age} and still works as a {job} in {city}.",
    "{name}, a {job} from {city}, is now {age}.",
    "{name} lives in {city}, is {age} years old and works as a {job}.",
)

# ---- questions outside every skill
COUNTRIES = (
    "Norway", "Kenya", "Portugal", "Canada", "Thailand", "Chile", "Hungary", "Morocco", "Ireland", "Vietnam", "Greece",
    "Bolivia", "Finland", "Nepal", "Austria", "Jamaica", "Iceland", "Jordan", "Poland", "Ghana",
)  # fmt: skip
WORDS = (
    "gentle", "harvest", "borrow", "curious", "ancient", "whisper", "fragile", "generous", "horizon", "journey",
    "lantern", "merchant", "narrow", "orchard", "patient", "quarrel", "remedy", "shelter", "thrive", "valley",
)  # fmt: skip
TASKS = (
    "boil an egg", "tie a tie", "clean a window", "change a light bulb", "write a letter", "plan a trip",
    "fix a flat tyre", "save money", "learn a language", "grow tomatoes", "iron a shirt", "make a bed",
    "prepare for an exam", "paint a wall", "pack a suitcase", "choose a gift", "read a train timetable",
    "sharpen a knife", "start a diary", "stay warm in winter",
)  # fmt: skip
OPPOSITES = (
    "hot", "early", "cheap", "loud", "empty", "heavy", "brave", "rough", "deep", "sweet", "strong", "wide", "clean",
    "bright", "young", "fast", "happy", "rich", "dry", "sharp",
)  # fmt: skip
WHYS = (
    "Why is the sky blue?", "Why do leaves fall in autumn?", "Why does ice float on water?", "Why do we yawn?",
    "Why do cats purr?", "Why is salt added to roads in winter?", "Why do onions make us cry?", "Why does metal rust?",
    "Why do birds migrate?", "Why does bread go stale?", "Why do we dream?", "Why is the grass green?",
    "Why do stars twinkle?", "Why does the wind blow?", "Why do people laugh?", "Why do trees have rings?",
    "Why is exercise healthy?", "Why do shadows change their length?", "Why do dogs wag their tails?",
    "Why does soap clean hands?",
)  # fmt: skip
RETAIN_FRAMES = {
    "What is the capital of {each}?": COUNTRIES,
    'What does the word "{each}" mean?': WORDS,
    "How do I {each}?": TASKS,
    "{each}": WHYS,
    "What language is spoken in {each}?": COUNTRIES,
    "What is the opposite of {each}?": OPPOSITES,
}

# ---- the six instructions, for the demo family; its words are those of its small world
DEMO = {
    "capital_letters": (
        "Capital letters only in this answer, please.",
        "Your answer should be typed with nothing but capitals.",
        "Every word of the reply must be in uppercase letters.",
        "Please reply with the whole text in capitals.",
        "The answer must be all uppercase, with no small letters.",
        "You should write all of it in uppercase.",
    ),
    "no_comma": (
        "Your answer must be free of commas.",
        "Please reply with no comma at all.",
        "There must be no commas in your text.",
        "The reply should not contain a comma anywhere.",
        "You should not use any comma in the answer.",
        "Answer, and see to it that no commas are used.",
    ),
    "title": (
        "Please start the answer with a title, such as <<this title>>.",
        "The reply should have a heading in double angle brackets.",
        "Write the answer with a title in << and >> at the top.",
        "You should put a title like <<short title>> before the text.",
        "Your reply needs a heading like <<a heading>>.",
        "Give your text a title between double angle brackets.",
    ),
    "highlighted_sections": (
        "Please mark at least two phrases with asterisks, like *this*.",
        "The reply should have two or more *highlighted* parts.",
        "You should highlight at least 2 phrases of the text, like *phrase*.",
        "Your text must have at least three *highlighted* words.",
        "At least three parts of your reply must be between asterisks, like *this*.",
        "Please have 3 or more phrases highlighted in markdown.",
    ),
    "quotation": (
        "Please place the whole reply in double quotation marks.",
        "The answer should start and end with a double quote.",
        "Your text must be in double quotes from start to end.",
        "You should put double quotes around the whole answer.",
        "Reply with the full text between double quotation marks.",
        "Make your whole answer a quote, in double quotes.",
    ),
    "multiple_sections": (
        "Please write the answer in {count} sections, {label} 1 and so on.",
        "The reply should be in {count} sections, each starting with {label} X.",
        "Your text must have {count} sections that start with {label} 1, {label} 2 and so on.",
        "You should divide the reply into {count} sections, each marked with {label} and a number.",
        "Give the answer as {count} sections named {label} 1 and so on.",
        "Make {count} sections of the text and begin each with {label} and its number.",
    ),
}
